"""Balanced linear assignment: T tokens to E experts, loads floor(T/E) or ceil(T/E), the sum of scores maximal.

First prices bring the experts' argmax loads near balance (on the scores' device); then single tokens move along
shortest paths between experts until the loads are exact (on the CPU). An assignment by argmax(score - price) is the
best for the loads that it has, a shortest path keeps that true, and the value is M-concave in the loads, so the end
is an optimum whatever the prices were; they only save time. It ends because every path lowers the imbalance, or
raises the value.

T tokens, E experts, c = floor(T/E)
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Assignment(NamedTuple):
    expert: Tensor  # (T,) int64
    value: float  # the sum of assigned scores
    gap: float  # certified distance to the optimum: (bound - value) / (T * standard deviation of the scores)


def balanced_assignment(scores: Tensor, price_steps: int | None = None) -> Assignment:
    """Assign each token once. scores (T, E), any device. Raises FloatingPointError if a score is not finite."""
    if not bool(torch.isfinite(scores).all()):
        raise FloatingPointError("balanced assignment needs finite scores")
    tokens, experts = scores.shape
    if tokens == 0:
        return Assignment(torch.zeros(0, dtype=torch.int64, device=scores.device), 0.0, 0.0)
    if price_steps is None:
        price_steps = 24 + tokens // 256  # the more tokens repeat, the more single moves a good start saves
    prices = balancing_prices(scores, price_steps)
    table = scores.double().cpu().numpy()
    expert = _spread_ties(table - prices.double().cpu().numpy())
    cost = _balance(table, expert)
    value = float(table[np.arange(tokens), expert].sum())
    spread = float(table.std()) * tokens
    excess = upper_bound(table, _final_prices(cost, expert)) - value
    gap = max(excess, 0.0) / spread if spread > 0 else 0.0
    return Assignment(torch.from_numpy(expert).to(scores.device), value, gap)


def upper_bound(scores: np.ndarray, prices: np.ndarray) -> float:
    """No balanced assignment of scores (T, E) exceeds this, whatever the prices (E,): linear duality."""
    tokens, experts = scores.shape
    least, more = divmod(tokens, experts)
    return float((scores - prices).max(1).sum() + least * prices.sum() + np.sort(prices)[experts - more :].sum())


def balancing_prices(scores: Tensor, steps: int) -> Tensor:
    """(E,) prices at which argmax(scores - prices) loads the experts nearly evenly.

    Each step moves every price nearly to where its expert alone would get its share: the margin by which the last
    of the c tokens that want it most prefers it to the best of the others.
    """
    tokens, experts = scores.shape
    prices = scores.new_zeros(experts)
    if experts == 1 or tokens < experts:
        return prices
    columns = scores.T.contiguous()  # (E, T)
    for _ in range(steps):
        reduced = columns - prices[:, None]
        best, winner = reduced.max(0)
        second = reduced.scatter(0, winner[None], -torch.inf).amax(0)
        margin = (reduced - best).scatter_(0, winner[None], (best - second)[None])  # >= 0 where the token wants it
        prices = prices + 0.9 * margin.kthvalue(tokens - tokens // experts, dim=1).values
    return prices


def _spread_ties(reduced: np.ndarray) -> np.ndarray:
    """(T,) argmax over experts; tokens with several equally good experts take them in turn."""
    best = reduced.max(1, keepdims=True)
    tied = reduced == best  # exactly: a tolerance would start off the optimum, and paths could then be cycles
    turn = np.arange(len(reduced)) % tied.sum(1) + 1
    return (tied & (tied.cumsum(1) == turn[:, None])).argmax(1)


def _balance(scores: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """Move tokens along shortest paths until loads are floor or ceil of T/E and no exchange gains.

    Changes expert (T,) in place. Returns (E, E), the least loss of moving one more token from expert to expert.
    """
    tokens, experts = scores.shape
    least, most = tokens // experts, -(-tokens // experts)
    load = np.bincount(expert, minlength=experts)
    cost = np.stack([_move_costs(scores, expert, j) for j in range(experts)])
    tolerance = 1e-12 * max(float(np.abs(scores).max()), 1e-300)
    while True:
        over, under = load > most, load < least
        exact = not over.any() and not under.any()
        length, step = _shortest(cost, over if over.any() else load > least, tolerance)
        length = np.where(under if under.any() else load < most, length, np.inf)
        last = int(length.argmin())
        if exact and not length[last] < -tolerance:
            return cost
        path = [last]
        while step[last] >= 0:
            first = int(step[last])
            members = np.flatnonzero(expert == first)
            moved = members[(scores[members, first] - scores[members, last]).argmin()]
            expert[moved] = last
            path.append(last := first)
            assert len(path) <= experts, "a cycle that gains: the assignment was not optimal for its loads"
        load[path[0]] += 1
        load[path[-1]] -= 1
        for changed in path:
            cost[changed] = _move_costs(scores, expert, changed)


def _move_costs(scores: np.ndarray, expert: np.ndarray, j: int) -> np.ndarray:
    """(E,) the least loss of moving one token of expert j to each other expert; infinite if j has none."""
    rows = scores.take(np.flatnonzero(expert == j), axis=0)
    return (rows[:, j : j + 1] - rows).min(0) if len(rows) else np.full(scores.shape[1], np.inf)


def _shortest(cost: np.ndarray, sources: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Bellman-Ford over experts: (E,) path length from the nearest source, and the expert before, -1 at a source."""
    length = np.where(sources, 0.0, np.inf)
    before = np.full(len(cost), -1)
    for _ in range(len(cost)):
        through = length[:, None] + cost
        nearest = through.argmin(0)
        shorter = through[nearest, np.arange(len(cost))] < length - tolerance
        if not shorter.any():
            break
        length = np.where(shorter, through[nearest, np.arange(len(cost))], length)
        before = np.where(shorter, nearest, before)
    return length, before


def _final_prices(cost: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """(E,) prices that certify an optimal assignment: shortest path lengths over its costs of moving (E, E)."""
    load = np.bincount(expert, minlength=len(cost))
    fuller = load > load.min()
    spare = np.ix_(~fuller, fuller)  # the places left over when E does not divide T go to the dearest experts
    cost[spare] = np.minimum(cost[spare], 0.0)
    prices = np.zeros(len(cost))
    for _ in range(len(cost)):
        prices = np.minimum(prices, (cost + prices).min(1))
    return prices
