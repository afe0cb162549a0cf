"""Dispatch: sort rows by expert, run the experts, return to token order. The only file that moves rows.

T tokens, A assignments, E experts, G groups of rows, D width
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, grouped_mm

from models.experts import ExpertLayer, with_bias
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


def dispatch(x: Tensor, routing: Routing, plan: Plan | None, experts: ExpertLayer, path: str) -> Tensor:
    """sum over assignments a of weight[a] * expert[a](x[token[a]]), for each token. x (T, D) -> (T, D).

    Of segmented experts a token's assignments give the parts of one output instead, side by side. A plan made with the
    batch is used; without one it is made here. No host sync on the grouped path.
    """
    segments, fan_out = experts.segments, routing.fan_out
    if plan is None:
        plan = make_plan(routing.expert, experts.num_experts, segments)
    rows = routing.token.index_select(0, plan.order)

    def exchange(inner: Tensor) -> Tensor:
        """Each row gets the segments of all its token's rows."""
        whole = inner.index_select(0, plan.inverse).view(-1, segments * inner.shape[-1])
        return whole.index_select(0, rows)

    product = partial(grouped if path == "grouped_mm" else looped, offsets=plan.offsets)
    y = experts(x.index_select(0, rows), product, exchange if segments > 1 else None)  # in order of expert
    y = (y * routing.weight.index_select(0, plan.order)[:, None]).to(y.dtype)
    if fan_out is None:
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, rows, y)
    y = y.index_select(0, plan.inverse).view(-1, fan_out, y.shape[-1])  # a token's assignments next to each other
    return y.flatten(1) if fan_out == segments else y.sum(1)


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Rows of group g times weight[g], in autocast's type where that is on. x (A, K), weight (G, K, N) -> (A, N).

    bias (G, N) or None; offsets (G,) int32: where each group of rows ends.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    y = grouped_mm(x, weight, offs=offsets)
    if bias is None:
        return y
    group = torch.searchsorted(offsets, torch.arange(len(x), dtype=offsets.dtype, device=x.device), right=True)
    return with_bias(y, embedding(group, bias))


def looped(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """The same, one group after the other: the oracle, for every dtype. Waits for the device."""
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    biases = [None] * len(weight) if bias is None else bias
    return torch.cat([with_bias(rows @ matrix, b) for rows, matrix, b in zip(x.split(sizes), weight, biases)])
