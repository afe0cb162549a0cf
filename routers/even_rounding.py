"""From soft choices to an assignment with exact loads: draw, feed the error back, move along a tree, place the rest.

All on the scores' device, a fixed number of kernels, no host sync, and the same result each time.

G groups, N rows, E experts
"""

import torch
from torch import Tensor

from routers.compiled import compiled_on_gpu
from routers.even_prices import COLDEST, soft_choice, solved

FEEDBACK = (0.7, 0.5, 0.4, 0.3)  # share of the loads' error that is fed back into the prices; the best draw stays
JITTER = 1e-5  # of the scores' deviation: parts rows that are equal
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927  # steps of sequences that fill [0, 1) evenly
FAR = 1e9  # a loss above all others


def round_evenly(rows: Tensor, real: Tensor, prices: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """(G, N) int64: each expert target (G, E) times among the real rows; E where not real. factor: see even_prices."""
    expert = best_draw(rows, real, prices, factor, target)
    steps = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device)[:, None] * GOLDEN
    steps = steps + torch.arange(rows.shape[2], dtype=torch.float64, device=rows.device) * PLASTIC
    jitter = JITTER * steps.frac().to(rows.dtype)  # (N, E)
    return rest_placed(rows, moved_along_a_tree(rows, jitter, expert, target), target)


@compiled_on_gpu
def best_draw(rows: Tensor, real: Tensor, prices: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """The draw (G, N) with the most even loads; what was too much in one raises the price for the next."""
    best, fewest = None, None
    for share in (*FEEDBACK, 0.0):
        expert = drawn(soft_choice(rows, real, prices), real)
        error = loads(expert, rows.shape[2]) - target
        wrong = error.abs().sum(1)
        if best is None or fewest is None:
            best, fewest = expert, wrong
        best = torch.where((wrong < fewest)[:, None], expert, best)
        fewest = torch.minimum(wrong, fewest)
        prices = prices + share * COLDEST * solved(factor, error.to(prices.dtype)).clamp(-3, 3)
    return best  # type: ignore[return-value]


def drawn(choice: Tensor, real: Tensor) -> Tensor:
    """An expert for each row by its choice (G, N, E). Successive rows draw with numbers that lie evenly apart, so that
    rows that are alike, which stand near each other, are parted in nearly their shares."""
    experts = choice.shape[-1]
    upto = choice @ torch.ones(experts, experts, device=choice.device, dtype=choice.dtype).triu()
    number = (torch.arange(choice.shape[1], dtype=torch.float64, device=choice.device) + 0.5) * GOLDEN
    below = upto < number.frac().to(choice.dtype)[:, None] * upto[..., -1:]
    return torch.where(real, below.sum(-1).clamp(max=experts - 1), experts)


def loads(expert: Tensor, experts: int) -> Tensor:
    """(G, E) int64 of expert (G, N); E counts for none."""
    zeros = torch.zeros(len(expert), experts + 1, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add(1, expert, torch.ones_like(expert))[:, :experts]


@compiled_on_gpu
def moved_along_a_tree(rows: Tensor, jitter: Tensor, expert: Tensor, target: Tensor) -> Tensor:
    """What is too much goes along the tree of cheapest moves between experts, on which there is but one way.

    An edge takes as many rows as its part of the tree has too many, those that lose least. A row that two edges want
    follows one of them, so that loads may be off by a few still.
    """
    experts = rows.shape[2]
    at = expert.clamp(max=experts - 1)[..., None]
    loss = rows.gather(2, at) - rows + jitter  # (G, N, E) of a row that goes to another expert
    cheapest = torch.full((len(rows), experts + 1, experts), FAR, dtype=rows.dtype, device=rows.device)
    cheapest = cheapest.scatter_reduce(1, expert[..., None].expand_as(loss), loss, "amin")[:, :experts]  # (G, E, E)
    flow = tree_flow(spanning_tree(torch.maximum(cheapest, cheapest.mT)), loads(expert, experts) - target)
    every = at.expand_as(loss)
    wanted = (flow.gather(1, every) > 0) & (expert < experts)[..., None]
    least, to = (loss - cheapest.gather(1, every)).masked_fill(~wanted, torch.inf).min(-1)
    edge = torch.where(wanted.any(-1), at[..., 0] * experts + to, experts * experts)
    quota = torch.cat([flow.flatten(1), flow.new_zeros(len(flow), 1)], 1).gather(1, edge)
    return torch.where(rank_within(edge, experts * experts + 1, least) < quota, to, expert)


def spanning_tree(cost: Tensor) -> Tensor:
    """(G, E, E) bool, both ways: the minimum spanning tree of symmetric costs (G, E, E).

    An edge is of the tree if no way round has only cheaper edges: ways are closed under (min, max) by doubling.
    """
    groups, experts, _ = cost.shape
    upper = torch.ones(experts, experts, dtype=torch.bool, device=cost.device).triu(1)
    order = cost.masked_fill(~upper, torch.inf).flatten(1).argsort(dim=1, stable=True)
    places = torch.arange(experts * experts, device=cost.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places).view_as(cost)  # no two edges are equal
    direct = torch.where(upper, rank, 0) + torch.where(upper, rank, 0).mT
    way, width = direct, max(1, 2**22 // (groups * experts * experts))
    for _ in range((experts - 1).bit_length()):
        for first in range(0, experts, width):
            middle = slice(first, first + width)
            through = torch.maximum(way[:, :, middle, None], way[:, None, middle, :]).amin(2)
            way = torch.minimum(way, through)
    return (direct <= way) & (upper | upper.mT)


def tree_flow(tree: Tensor, excess: Tensor) -> Tensor:
    """(G, E, E) int64 >= 0: what goes from expert to expert along the tree, so that excess (G, E) becomes 0.

    On a tree it is the difference of potentials whose Laplacian is the excess.
    """
    edges, experts = tree.double(), tree.shape[1]
    laplacian = torch.diag_embed(edges.sum(-1)) - edges + 1 / experts  # its kernel, all ones, filled
    potential = solved(torch.linalg.cholesky_ex(laplacian)[0], excess.double())
    return ((potential[:, :, None] - potential[:, None]) * edges).round().long().clamp(min=0)


@compiled_on_gpu
def rest_placed(rows: Tensor, expert: Tensor, target: Tensor) -> Tensor:
    """Exact loads, whatever they were: each expert gives up what it has too much, what loses least; the places left
    are filled in order."""
    experts = rows.shape[2]
    load = loads(expert, experts)
    over, room = (load - target).clamp(min=0), (target - load).clamp(min=0)
    best = rows.masked_fill((room == 0)[:, None], -FAR).amax(-1)
    loss = rows.gather(2, expert.clamp(max=experts - 1)[..., None])[..., 0] - best
    allowed = torch.cat([over, over.new_zeros(len(over), 1)], 1).gather(1, expert)
    leaves = rank_within(expert, experts + 1, loss) < allowed
    number = leaves.cumsum(1) - 1
    place = torch.searchsorted(room.cumsum(1), number, right=True).clamp(max=experts - 1)
    return torch.where(leaves, place, expert)


def rank_within(key: Tensor, keys: int, value: Tensor) -> Tensor:
    """(G, N) the place of each row, by value, among those of its key, one of 0 to keys - 1; ties in order."""
    key = key.to(torch.int16 if keys <= 1 << 15 else torch.int32)  # a GPU sorts fewer bits in fewer passes
    order = value.argsort(dim=1, stable=True)
    order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    ordered = key.gather(1, order)
    place = torch.arange(key.shape[1], device=key.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter(1, order, place)
