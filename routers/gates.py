"""What learned routers share: the gate's scores, losses and capacity.

G routing groups, N tokens a group, E experts, k choices a token
"""

import torch
from torch import Tensor, nn

from data.batches import Tokens
from data.randomness import uniform
from routers.routing import Site, at_least_float32


def gate_parameter(site: Site, name: str = "gate", rows: int | None = None) -> nn.Parameter:
    """(E, D), or (rows, D): Switch's truncated normal of variance 0.1 / D (arXiv 2101.03961, section 2.4)."""
    gate = torch.empty(rows or site.num_experts, site.d_model)
    deviation = (0.1 / site.d_model) ** 0.5
    nn.init.trunc_normal_(gate, 0, deviation, -2 * deviation, 2 * deviation, site.generator(name))
    return nn.Parameter(gate)


def gate_scores(hidden: Tensor, gate: Tensor) -> Tensor:
    """W h in at least float32, also under autocast. hidden (B, S, D), gate (E, D) -> (B, S, E)."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = at_least_float32(hidden)
        return hidden @ gate.to(hidden.dtype).T


def top(scores: Tensor, k: int) -> Tensor:
    """(..., k) int64, the k highest of scores (..., E) in falling order; of equal ones the lowest expert id first."""
    return torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices[..., :k]


def jittered(hidden: Tensor, tokens: Tokens, layer: int, eps: float) -> Tensor:
    """hidden times U(1 - eps, 1 + eps), drawn from (key, layer, position, column)."""
    column = torch.arange(hidden.shape[-1], device=hidden.device)
    draw = uniform(tokens.key[:, None, None], layer, tokens.position[..., None], column)
    return at_least_float32(hidden) * (1 + eps * (2 * draw - 1))


def choices(expert: Tensor, tokens: Tokens, site: Site) -> Tensor:
    """(G, N, E) how often a token chose each expert, 0 on padding. expert (B, S, k)."""
    chosen = torch.zeros(*expert.shape[:2], site.num_experts, dtype=torch.int64, device=expert.device)
    chosen = chosen.scatter_add(-1, expert, torch.ones_like(expert)) * tokens.real[..., None]
    return chosen.view(-1, site.routing_group * expert.shape[1], site.num_experts)


def balance_loss(choice: Tensor, probability: Tensor) -> Tensor:
    """E * sum_i f_i P_i (Switch, eq. 4), the mean over groups: 1 at uniform. choice (G, N, E) from choices().

    f_i: share of the choices that are i, before dropping, without gradient. P_i: mean probability (G, N, E) of i.
    """
    real = (choice.sum(-1, keepdim=True) > 0).to(probability.dtype)  # (G, N, 1)
    share = choice.sum(1).to(probability.dtype) / choice.sum((1, 2)).clamp(min=1)[:, None]  # (G, E)
    mean_probability = (probability.view(choice.shape) * real).sum(1) / real.sum(1).clamp(min=1)
    return choice.shape[-1] * (share * mean_probability).sum(-1).mean()


def z_loss(scores: Tensor, tokens: Tokens, group: int) -> Tensor:
    """The mean over a group's real tokens of logsumexp(scores)^2 (ST-MoE, arXiv 2202.08906, eq. 5), and over groups.

    scores (B, S, E).
    """
    real = tokens.real.view(-1, group * tokens.real.shape[1]).to(scores.dtype)  # (G, N)
    squares = scores.logsumexp(-1).square().view(real.shape) * real
    return (squares.sum(1) / real.sum(1).clamp(min=1)).mean()


def within_capacity(choice: Tensor, capacity_factor: float) -> Tensor:
    """(G, N, E) bool: which choices find room, in order of position. choice (G, N, E) of 0 and 1.

    An expert takes ceil(capacity_factor * choices / E), choices being those of the group's real tokens.
    """
    capacity = torch.ceil(choice.sum((1, 2)).double() * capacity_factor / choice.shape[-1])
    return (choice > 0) & (choice.cumsum(1) <= capacity[:, None, None])
