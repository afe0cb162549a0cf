"""Prices at which soft demand is even: Newton's method on the entropic dual of the balanced assignment.

The dual at temperature t, sum_i t logsumexp((s_i - p) / t) + sum_j c_j p_j, is smooth; its gradient is capacity less
demand, c - load, its Hessian the Laplacian (diag(load) - P'P) / t of experts that compete for the same tokens
(Sinkhorn's problem: Cuturi, arXiv 1306.0895; Newton's method for it: Brauer, Clason, Lorenz, Wirth, arXiv 1710.06635).
Demand is followed while t falls: each step corrects demand and foresees what the next temperature changes, to first
order, so that a step an octave is enough even where rows are repeated. All on the scores' device, a fixed number of
kernels, no host sync.

G groups, N rows, E experts
"""

import math

import torch
from torch import Tensor

from routers.compiled import compiled_on_gpu

STEPS = 14  # temperatures from HOTTEST to COLDEST, of the scores' deviation
HOTTEST = 3.0  # at 1, words that prefer an expert by nine deviations leave its price behind for good
COLDEST = 3e-4
DAMPING = 1e-3  # of the mean load: experts that share no token are tied by this alone
PARTS = 64  # in which P'P is summed
STRIDE = 2.5  # temperatures that a price may move in a step


def even_prices(rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Prices (G, E) at which soft demand is even, and the factor (G, E, E) of the Hessian there.

    rows (G, N, E) of deviation 1, rows that are alike near each other; real (G, N), False: takes part in nothing.
    """
    prices, cooling = rows.new_zeros(rows.shape[0], rows.shape[2]), (COLDEST / HOTTEST) ** (1 / (STEPS - 1))
    step_numbers = torch.arange(STEPS, dtype=rows.dtype, device=rows.device)  # a tensor: not one graph for each
    temperature = HOTTEST * cooling**step_numbers
    for step in range(STEPS - 1):
        prices = newton_step(rows, real, prices, temperature[step], cooling)
    prices = newton_step(rows, real, prices, temperature[-1], 1.0)  # settles there
    choice = soft_choice(rows, real, prices)
    return prices, factor(rivalry(choice))


@compiled_on_gpu
def newton_step(rows: Tensor, real: Tensor, prices: Tensor, temperature: Tensor, cooling: float) -> Tensor:
    """Prices (G, E) that even demand out at temperature * cooling, to first order. temperature ()."""
    reduced = (rows - prices[:, None]) / temperature  # (G, N, E)
    choice = reduced.softmax(-1) * real[..., None]
    rivals = rivalry(choice)
    surplus = rivals.sum(-1) - real.sum(1, keepdim=True) / rows.shape[2]
    if cooling < 1:  # what a lower temperature adds: the sum of P (z - <z>)
        weighed = choice * reduced
        mean = weighed.sum(-1, keepdim=True)
        surplus = surplus + (1 - cooling) * torch.addcmul(weighed, choice, mean, value=-1).sum(1)
    return prices + temperature * solved(factor(rivals), surplus).clamp(-STRIDE, STRIDE)


def rivalry(choice: Tensor) -> Tensor:
    """P'P (G, E, E) of choice (G, N, E); its rows add up to the load. In parts, for many processors."""
    parts = choice.unflatten(1, (math.gcd(choice.shape[1], PARTS), -1))
    return (parts.mT @ parts).sum(1)


def soft_choice(rows: Tensor, real: Tensor, prices: Tensor) -> Tensor:
    """P (G, N, E) at the last temperature, 0 where not real."""
    return ((rows - prices[:, None]) / COLDEST).softmax(-1) * real[..., None]


def factor(rivals: Tensor) -> Tensor:
    """Cholesky factor (G, E, E), float64, of diag(load) - P'P, damped. cholesky_ex does not wait for the device."""
    load = rivals.sum(-1).double()
    mean = load.mean(-1).clamp(min=1)[:, None, None]
    ones = torch.eye(load.shape[1], dtype=torch.float64, device=load.device)
    return torch.linalg.cholesky_ex(torch.diag_embed(load) - rivals.double() + DAMPING * mean * ones)[0]


def solved(cholesky: Tensor, right: Tensor) -> Tensor:
    """(G, E) solutions, in the type of right (G, E), by a factor of factor()."""
    return torch.cholesky_solve(right.double()[..., None], cholesky).squeeze(-1).to(right.dtype)
