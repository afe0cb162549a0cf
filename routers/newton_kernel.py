"""Soft demand and its Hessian in one pass over the scores. Triton, for GPUs; routers.even_prices has the same in torch.

G groups, N rows, E experts, P programs a group
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128
ROWS = 32  # at once


@triton.jit
def _soft_demand(rows, real, prices, temperature, rivals, ahead, N, E, EP: tl.constexpr, ROWS: tl.constexpr):
    group, program, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, EP)
    inside = column < E
    heat = tl.load(temperature)
    price = tl.load(prices + group * E + column, mask=inside, other=0.0)
    products, foreseen = tl.zeros((EP, EP), dtype=tl.float32), tl.zeros((EP,), dtype=tl.float32)
    for first in range(program * ROWS, N, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < N
        place = (group.to(tl.int64) * N + row)[:, None] * E + column[None, :]
        score = tl.load(rows + place, mask=there[:, None] & inside[None, :], other=0.0)
        reduced = tl.where(inside[None, :], (score - price[None, :]) / heat, float("-inf"))
        reduced -= tl.max(reduced, 1)[:, None]
        weight = tl.exp(reduced)
        counts = tl.load(real + group.to(tl.int64) * N + row, mask=there, other=0).to(tl.float32)
        choice = weight * (counts / tl.sum(weight, 1))[:, None]
        weighed = choice * tl.where(inside[None, :], reduced, 0.0)
        foreseen += tl.sum(weighed - choice * tl.sum(weighed, 1)[:, None], 0)
        products = tl.dot(tl.trans(choice), choice, products, input_precision="tf32x3")
    out = group * programs + program
    tl.store(ahead + out * E + column, foreseen, mask=inside)
    square = (out.to(tl.int64) * E + column[:, None]) * E + column[None, :]
    tl.store(rivals + square, products, mask=inside[:, None] & inside[None, :])


def soft_demand(rows: Tensor, real: Tensor, prices: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """P'P (G, E, E) and the sum of P (z - <z>) (G, E), z = (rows - prices) / temperature (), P = softmax(z).

    rows (G, N, E) and prices (G, E) float32, contiguous; real (G, N) bool, False: takes no part. E up to
    even_prices.MOST_EXPERTS.
    """
    groups, number, experts = rows.shape
    rivals = rows.new_empty(groups, PROGRAMS, experts, experts)
    ahead = rows.new_empty(groups, PROGRAMS, experts)
    padded, grid = max(16, triton.next_power_of_2(experts)), (PROGRAMS, groups)
    warps = 4 if padded <= 64 else 8
    _soft_demand[grid](rows, real, prices, temperature, rivals, ahead, number, experts, padded, ROWS, num_warps=warps)
    return rivals.sum(1), ahead.sum(1)
