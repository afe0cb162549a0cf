"""Dispatch: sort rows by expert, run the experts, return to token order. The only file that moves rows.

T tokens, A assignments, N assignments a token, E experts, D width
"""

import torch
from torch import Tensor

from models.experts import Experts
from routers.routing import Plan, Routing, make_plan

PATHS = ("auto", "grouped_mm", "loop")


def choose_path(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which path runs: grouped_mm in bf16 on a Hopper GPU or newer and in float32 on a CPU, else the loop.

    wanted: auto, grouped_mm or loop; dtype: what the experts compute in. Raises ValueError for grouped_mm where it
    would silently be a slow loop or does not exist.
    """
    good = dtype == torch.float32
    if device.type == "cuda":
        good = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    if wanted == "grouped_mm" and not good:
        rule = "needs bf16 on a Hopper GPU or float32 on a CPU"
        raise ValueError(f"model.dispatch=grouped_mm {rule}; got {dtype} on {device}")
    return ("grouped_mm" if good else "loop") if wanted == "auto" else wanted


def dispatch(x: Tensor, routing: Routing, plan: Plan | None, experts: Experts, path: str) -> Tensor:
    """sum over assignments a of weight[a] * expert[a](x[token[a]]), for each token. x (T, D) -> (T, D).

    A plan made with the batch is used; without one it is made here. No host sync on the grouped path.
    """
    if plan is None:
        plan = make_plan(routing.expert, experts.num_experts)
    rows = routing.token.index_select(0, plan.order)
    run = experts if path == "grouped_mm" else experts.loop
    y = run(x.index_select(0, rows), plan.offsets)  # (A, D), in order of expert
    y = (y * routing.weight.index_select(0, plan.order)[:, None]).to(y.dtype)
    if routing.fan_out is None:
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, rows, y)
    y = y.index_select(0, plan.inverse)  # a token's assignments next to each other
    return y if routing.fan_out == 1 else y.view(-1, routing.fan_out, y.shape[-1]).sum(1)
