"""Balanced assignment that stays on the device: exact loads, a value within a certified gap of the optimum.

The same problem as routers.assignment solves exactly. Prices by Newton steps (routers.even_prices), then exact loads
(routers.even_rounding), then the bound of linear duality at the prices. No state, no host sync, no branch on data: a
fixed number of kernels, the same result for the same scores.

G groups, N tokens, E experts
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from routers.compiled import compiled_on_gpu
from routers.even_prices import even_prices
from routers.even_rounding import round_evenly


def fast_assignment(scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Assign the real tokens of each group on their own. scores (G, N, E) float, real (G, N) bool.

    Returns experts (G, N) int64, 0 where not real, each floor(n / E) or ceil(n / E) times among a group's n real
    tokens, and gaps (G,) float64: (bound - value) / (n * standard deviation of the scores), certified. Scores that are
    not finite give loads as exact and a gap that is not a number.
    """
    finite = torch.nan_to_num(scores.float(), 0.0, 0.0, 0.0)
    centres, scale, rows = standardised(finite, real)
    order = alike_together(rows, real)
    ordered = rows.gather(1, order[..., None].expand_as(rows))
    ordered_real = real.gather(1, order)
    prices, factor = even_prices(ordered, ordered_real)
    whole_prices = centres + scale * prices
    target = shares(ordered_real.sum(1, keepdim=True), whole_prices)
    expert = round_evenly(ordered, ordered_real, prices, factor, target)
    expert = torch.empty_like(expert).scatter(1, order, expert)
    expert = torch.where(real, expert, 0)
    return expert, certified_gap(scores, real, expert, whole_prices)


def replayed_assignment(scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """fast_assignment; on a GPU from a CUDA graph, recorded once for each shape: 800 launches in one."""
    if not scores.is_cuda:
        return fast_assignment(scores, real)
    recorded = _recorded(scores.shape, scores.dtype, scores.device)
    recorded.scores.copy_(scores)
    recorded.real.copy_(real)
    recorded.graph.replay()
    return recorded.expert.clone(), recorded.gaps.clone()


class Recorded(NamedTuple):
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    scores: Tensor
    real: Tensor
    expert: Tensor
    gaps: Tensor


@lru_cache(maxsize=4)
def _recorded(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Recorded:
    scores, real = (
        torch.zeros(shape, dtype=dtype, device=device),
        torch.ones(shape[:2], dtype=torch.bool, device=device),
    )
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # libraries make their workspaces before recording
        for _ in range(2):
            fast_assignment(scores, real)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread prepares the next batch
        expert, gaps = fast_assignment(scores, real)
    return Recorded(graph, scores, real, expert, gaps)


@compiled_on_gpu
def standardised(scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column means (G, E), a scale (G, 1), and rows (G, N, E): scores less the means of columns and rows, which no
    assignment can change, over the scale."""
    weight = real[..., None].to(scores.dtype)
    number = weight.sum(1).clamp(min=1)
    centres = (scores * weight).sum(1) / number
    rows = scores - centres[:, None]
    whole = ((rows.square() * weight).sum((1, 2)) / number[:, 0] / scores.shape[2]).sqrt()
    rows = (rows - rows.mean(-1, keepdim=True)) * weight
    spread = (rows.square().sum((1, 2)) / number[:, 0] / scores.shape[2]).sqrt()
    scale = torch.maximum(spread, 1e-3 * whole).clamp(min=torch.finfo(scores.dtype).tiny)[:, None]
    return centres, scale, rows / scale[..., None]


@compiled_on_gpu
def alike_together(rows: Tensor, real: Tensor) -> Tensor:
    """(G, N) an order in which equal rows stand together and those not real last: by a fixed projection."""
    step = torch.arange(1, rows.shape[2] + 1, dtype=torch.float64, device=rows.device)
    direction = (step * 2**0.5).frac() - 0.5
    along = (rows * direction.to(rows.dtype)).sum(-1)
    return along.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)


def shares(number: Tensor, prices: Tensor) -> Tensor:
    """(G, E) int64 loads of number (G, 1) tokens: floor(n / E), and one more for the dearest n mod E experts."""
    experts = prices.shape[1]
    order = prices.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(experts, device=prices.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    return number // experts + (rank < number % experts)


@compiled_on_gpu
def certified_gap(scores: Tensor, real: Tensor, expert: Tensor, prices: Tensor) -> Tensor:
    """(G,) float64: how far the value of expert (G, N) is from the bound at prices (G, E), see routers.assignment."""
    scores, prices, experts = scores.double(), prices.double(), scores.shape[2]
    number = real.sum(1, keepdim=True)  # (G, 1)
    best = (scores - prices[:, None]).amax(-1)
    excess = ((best - scores.gather(2, expert[..., None])[..., 0]) * real).sum(1)
    dearest = torch.arange(experts, device=scores.device) < number % experts
    excess = excess + (number // experts * prices + prices.sort(dim=1, descending=True).values * dearest).sum(1)
    weight, entries = real[..., None].double(), (number * experts).clamp(min=1)[..., None]
    mean = (scores * weight).sum((1, 2), keepdim=True) / entries
    spread = (((scores - mean).square() * weight).sum((1, 2)) / entries[:, 0, 0]).sqrt() * number[:, 0]
    return torch.where(spread == 0, 0.0, excess.clamp(min=0.0) / spread)
