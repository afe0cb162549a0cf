"""One AdamW update of a large tensor in one pass, clipping folded in. Triton, for GPUs."""
# pyright: reportMissingImports=false, reportIndexIssue=false

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _update(
    weight, gradient, mean, square, scale, skip, step, lr, decay, beta1, beta2, log_beta1, log_beta2, eps, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip) > 0:
        return
    taken = tl.load(step)
    correction1, correction2 = 1 - tl.exp(taken * log_beta1), 1 - tl.exp(taken * log_beta2)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gradient + place, mask=inside).to(tl.float32) * tl.load(scale)
    m = tl.load(mean + place, mask=inside)
    m += (1 - beta1) * (g - m)
    v = beta2 * tl.load(square + place, mask=inside) + (1 - beta2) * g * g
    p = tl.load(weight + place, mask=inside) * (1 - lr * decay)
    p -= lr / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(weight + place, p, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)


def update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], scale: Tensor, skip: Tensor) -> None:
    """torch.optim.AdamW's update of a float32 parameter with its gradient times scale (); none of it if skip () is 1.

    state: exp_avg, exp_avg_sq, and step (), which is counted already; group: the optimizer's options.
    """
    assert parameter.grad is not None
    size, logs = parameter.numel(), (math.log(beta) for beta in group["betas"])
    _update[(triton.cdiv(size, BLOCK),)](
        parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], scale, skip, state["step"],
        group["lr"], group["weight_decay"], *group["betas"], *logs, group["eps"], size, BLOCK, num_warps=8,
    )  # fmt: skip
