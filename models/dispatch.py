"""Dispatch: sort rows by expert, run the experts, return to token order. The only file that moves rows.

T tokens, A assignments, E experts, G groups of rows, D width
"""

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, grouped_mm

from models.experts import ExpertLayer, with_bias
from models.fused import Fused
from routers.routing import Plan, Routing, make_plan

PATHS = ("auto", "fused", "grouped_mm", "loop")
SMALL = 2**34  # multiply-adds of a product on rows: to there launches take longer than the work, fused's longest


def choose_path(wanted: str, device: torch.device, dtype: torch.dtype, work: float = math.inf) -> str:
    """Which path runs; auto takes the first that can, in the order of PATHS, but fused only for work that is not SMALL.
    fused: in bf16 on a Hopper GPU or newer, with Triton; grouped_mm: there, and in float32 on a CPU; loop: everywhere.

    dtype: what the experts compute in; work: tokens of a forward pass times D times F. Raises ValueError for a path
    that does not exist there, or silently is slow.
    """
    good = dtype == torch.float32
    if device.type == "cuda":
        good = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    fused = good and device.type == "cuda" and find_spec("triton") is not None
    rules = {"fused": (fused, "bf16 on a Hopper GPU, and Triton")}
    rules["grouped_mm"] = good, "bf16 on a Hopper GPU or float32 on a CPU"
    if wanted == "auto":
        if fused and work > SMALL:
            return "fused"
        return "grouped_mm" if good else "loop"
    can, rule = rules.get(wanted, (True, ""))
    if not can:
        raise ValueError(f"model.dispatch={wanted} needs {rule}; got {dtype} on {device}")
    return wanted


class _InOrder(torch.autograd.Function):
    """Rows of x (T, D) in the plan's order, each as often as its token has assignments (N); back, their sum.

    index_select would add it up row by row, on a GPU atomically; this reads it in one pass, with the same bits always.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor, fan_out: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.fan_out = fan_out
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.index_select(0, ctx.saved_tensors[0])
        return dx if ctx.fan_out == 1 else dx.unflatten(0, (-1, ctx.fan_out)).sum(1), None, None, None


class _BackInPlace(torch.autograd.Function):
    """Rows y (A, D) of the plan's order, in the order of assignments."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


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
        whole = _BackInPlace.apply(inner, plan.order, plan.inverse).view(-1, segments * inner.shape[-1])
        return _InOrder.apply(whole, rows, plan.inverse, segments)

    if path == "fused":
        product = Fused(plan.offsets, len(rows))
    else:
        product = partial(grouped if path == "grouped_mm" else looped, offsets=plan.offsets)
    x_rows = x.index_select(0, rows) if fan_out is None else _InOrder.apply(x, rows, plan.inverse, fan_out)
    y = experts(x_rows, product, exchange if segments > 1 else None)  # in order of expert
    y = (y * routing.weight.index_select(0, plan.order)[:, None]).to(y.dtype)
    if fan_out is None:
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, rows, y)
    y = _BackInPlace.apply(y, plan.order, plan.inverse).view(-1, fan_out, y.shape[-1])  # a token's next to each other
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
