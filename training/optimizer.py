"""AdamW, its learning rate, and a step that no loss or gradient that is not finite can take."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from models.transformer import Transformer
from training.settings import TrainSettings

NOT_DECAYED = ("embedding", "positions", "gain", "b_in", "b_out", "b_gate")


def make_optimizer(model: Transformer, train: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW of what train.update names. Matrices decay; embeddings, norms, biases and what belongs to a router
    do not."""
    decayed, free = [], []
    for name, p in trained(model, train.update).items():
        kept = p.dim() == 1 or ".router." in name or name.rpartition(".")[2] in NOT_DECAYED
        (free if kept else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


def trained(model: Transformer, update: str) -> dict[str, nn.Parameter]:
    """The parameters that train.update names: all, sparse or all_but_sparse. Sparse are the FFNs of model.sparse_layers
    with their routers; in a dense model the plain ones there."""
    sparse = {p for ffn in model.at_sparse_layers.values() for p in ffn.parameters()}
    named = model.named_parameters()
    return {name: p for name, p in named if update == "all" or (p in sparse) == (update == "sparse")}


def freeze(model: Transformer, update: str) -> None:
    """No gradient for what train.update leaves out."""
    wanted = trained(model, update)
    for name, p in model.named_parameters():
        if name not in wanted:
            p.requires_grad_(False)


def learning_rate(step: int, train: TrainSettings) -> float:
    """For step 0..steps-1: linear warm-up, then cosine or linear decay to min_lr_share of lr at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step + 1 - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    share = (1 + math.cos(math.pi * progress)) / 2 if train.schedule == "cosine" else 1 - progress
    return train.lr * (train.min_lr_share + (1 - train.min_lr_share) * share)


def step(
    optimizer: torch.optim.AdamW, lr: float, loss: Tensor, grad_clip: float, alive: Tensor | bool = True
) -> tuple[Tensor, Tensor]:
    """Clip and update, on the device alone. Returns the gradient norm before clipping and whether all was finite.

    The kernels take a flag (found_inf, as a gradient scaler gives it) and leave weights and state as they are if it is
    set, so that the host need not wait for it: if something is not finite, or alive () says that something was before.
    grad_clip 0 clips nothing.
    """
    moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in moving])
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    large = [(p, group) for group in optimizer.param_groups for p in group["params"] if _in_one_pass(p)]
    if grad_clip > 0:
        others = [p for p in moving if not any(p is each for each, _ in large)]
        torch.nn.utils.clip_grads_with_norm_(others, grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    skip = (~(finite & alive)).float()
    scale = (grad_clip / (norm + 1e-6)).clamp(max=1) if grad_clip > 0 else torch.ones_like(norm)
    for parameter, group in large:
        _update_large(optimizer, parameter, group, scale, skip)
    optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _in_one_pass(parameter: Tensor) -> bool:
    """Whether our kernel updates it: 16M weights or more on a GPU, as experts have, where memory's speed decides."""
    large = parameter.is_cuda and parameter.grad is not None and parameter.numel() >= 1 << 24
    return large and find_spec("triton") is not None


def _update_large(
    optimizer: torch.optim.AdamW, parameter: Tensor, group: dict[str, Any], scale: Tensor, skip: Tensor
) -> None:
    """As optimizer.step would, with clipping in the same pass; takes the gradient away."""
    from training.adamw_kernel import update  # needs Triton, which comes with torch for GPUs alone

    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1 - skip
    update(parameter, state, group, scale, skip)
    parameter.grad = None
