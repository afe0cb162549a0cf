"""The one interface between routers and the model.

B batch, S sequence, T = B*S tokens, D width, E experts, A assignments, V vocabulary
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch, Tokens
from data.randomness import generator


class Routing(NamedTuple):
    """Assignment a sends row token[a] to expert[a] and scales what comes back by weight[a].

    A token may appear never, once or several times. Weight 0 means masked out (over capacity, or padding).
    """

    token: Tensor  # (A,) int64, row of the flattened (T, D) input
    expert: Tensor  # (A,) int64 in [0, E)
    weight: Tensor  # (A,) at least float32, >= 0
    aux_loss: Tensor  # () at least float32, its coefficient already applied
    report: dict[str, Tensor] = {}  # detached scalars only this router has (never changed in place)
    fan_out: int | None = None  # N if token is arange(T) with each entry N times in a row; None if irregular


class Plan(NamedTuple):
    """What dispatch needs to move rows: assignments in order of their group, and where each group ends.

    A group is an expert; of experts cut into N segments it is a segment, expert * N + place among its token's N.
    """

    order: Tensor  # (A,) int64, assignments sorted by group, stable
    inverse: Tensor  # (A,) int64, order[inverse] = arange(A)
    offsets: Tensor  # (E * N,) int32, end of each group in order


class Balancing(NamedTuple):
    """The published loss in a router's aux_loss: coef * E * sum_i f_i P_i (Switch, arXiv 2101.03961, eq. 4) +
    z_coef * mean logsumexp(s)^2 (ST-MoE, arXiv 2202.08906, eq. 5), over a group's real tokens, the mean over groups.

    f_i: share of the highest `choices` scores of all tokens that are i, before any is dropped; P_i: mean probability.
    """

    scores: Tensor  # (B, S, E) s
    probability: Tensor  # (B, S, E)
    coef: float
    choices: int = 1
    z_coef: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where a router stands and what it may know before training. Raises ValueError in routers that refuse it."""

    layer: int
    num_experts: int
    d_model: int
    vocab_size: int
    token_counts: Tensor = field(repr=False)  # (V,) int64, training split
    begin: int
    end: int
    routing_group: int  # sequences over which capacity, balancing losses and assignments are taken
    seed: int
    sequence_length: int
    sparse_layers: tuple[int, ...]  # in rising order; layer is one of them
    training_text: Callable[[], Iterable[Batch]] | None = field(default=None, repr=False)  # None: options are checked
    baseline: nn.Module | None = field(default=None, repr=False)  # the trained model that router.baseline names
    table_seed: int | None = None  # of hash tables and hashed features; None: the seed, which is of all else
    in_encoder: bool = False  # the tokens it sees are the encoder's, batch.routed(in_encoder)

    @property
    def draws(self) -> int:
        """The seed of tables and hashed features."""
        return self.seed if self.table_seed is None else self.table_seed

    def generator(self, *names: object) -> torch.Generator:
        """A generator seeded by (seed, layer, names) alone."""
        return generator(self.seed, "router", self.layer, *names)


class Router(nn.Module):
    """Decides which expert sees which token. The methods after forward do nothing unless a method needs them.

    What a method may declare about itself stands below.
    """

    experts_per_token: int = 1  # assignments of a token; the experts' width is divided by it
    segments: int = 1  # into how many segments it wants each expert cut (experts=segmented)
    forward_flops: int = 0  # matrix-product FLOPs per token in a forward pass, of what learns
    fixed_flops: int = 0  # the same, of what does not learn and has no backward pass
    trains_differently: bool = False  # routes otherwise in training than in evaluation: both are evaluated
    uses_prediction: bool = False  # reads tokens.predicted, the baseline's argmax of the next token
    imitates: bool = False  # is drawn from the routing of router.baseline, a run with a routed layer where it stands
    even_loads: bool = False  # in training the loads of a routing group differ by at most one
    follows_load: bool = False  # after_step evens the loads
    load_bound: float | None = None  # of the fullest expert over the mean, on the training text, for each segment
    leaks: frozenset[str] = frozenset()  # what routing sees beyond a token's past, from LEAKS

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        """Route. hidden (B, S, D) is the expert layer's normed input."""
        raise TypeError(f"{type(self).__name__} is a router without a forward")

    def plan(self, tokens: Tokens) -> Plan | None:
        """For routers that need tokens alone: the plan, made with the batch and off the step's critical path."""
        return None

    def balancing(self, hidden: Tensor, tokens: Tokens) -> Balancing | None:
        """What the certificate holds aux_loss against, if it is the published load-balancing loss."""
        return None

    def after_step(self, load: Tensor, progress: float) -> None:
        """Once per optimizer step: load (E,) summed over the step's micro-batches, progress in [0, 1]."""


LEAKS = frozenset(f"{what} in {mode}" for what in ("future", "mates") for mode in ("training", "evaluation"))


def make_plan(expert: Tensor, num_experts: int, segments: int = 1) -> Plan:
    """Sort assignments (A,) by group (see Plan), ties in order of assignment. No host sync."""
    places = torch.arange(len(expert), device=expert.device)
    group = expert if segments == 1 else expert * segments + places % segments
    groups = num_experts * segments
    ends = torch.arange(groups, dtype=torch.int16 if groups < 1 << 15 else torch.int32, device=expert.device)
    ordered, order = torch.sort(group.to(ends.dtype), stable=True)  # a GPU sorts fewer bits in fewer passes
    inverse = torch.empty_like(order).scatter_(0, order, places)
    return Plan(order, inverse, torch.searchsorted(ordered, ends, right=True, out_int32=True))


def count(expert: Tensor, num_experts: int, weight: Tensor | None = None) -> Tensor:
    """(E,) how many of the assignments (A,) go to each expert, or their summed weight. No host sync."""
    weight = torch.ones_like(expert) if weight is None else weight
    return torch.zeros(num_experts, dtype=weight.dtype, device=expert.device).scatter_add_(0, expert, weight)


def at_least_float32(x: Tensor) -> Tensor:
    """Router scores, weights and losses are never of fewer bits."""
    return x if x.dtype == torch.float64 else x.float()


def one_each(expert: Tensor, weight: Tensor, aux_loss: Tensor | None = None, report: dict = {}) -> Routing:  # noqa: B006
    """A routing of one expert a token. expert (B, S); weight (B, S), cast to at least float32."""
    return some_each(expert[..., None], weight[..., None], aux_loss, report)


def some_each(expert: Tensor, weight: Tensor, aux_loss: Tensor | None = None, report: dict = {}) -> Routing:  # noqa: B006
    """A routing of N experts a token. expert (B, S, N); weight (B, S, N), cast to at least float32."""
    fan_out = expert.shape[-1]
    expert, weight = expert.reshape(-1), at_least_float32(weight.reshape(-1))
    aux_loss = weight.new_zeros(()) if aux_loss is None else aux_loss
    places = torch.arange(len(expert), device=expert.device)
    return Routing(places // fan_out, expert, weight, aux_loss, report, fan_out)


def load_of(routing: Routing, num_experts: int) -> Tensor:
    """(E,) int64, assignments that each expert serves: padding and what is over capacity left out."""
    return count(routing.expert, num_experts, (routing.weight > 0).long())


def load_metrics(routing: Routing, real: Tensor, num_experts: int) -> dict[str, Tensor]:
    """The same figures for every router, from the routing alone. real (B, S) bool. Scalars, detached, no host sync.

    max_over_mean: fullest expert over the mean load. entropy: of the loads, as a share of log E. dropped: share of
    real tokens' assignments with weight 0. weight: mean of what experts' outputs are scaled by, where they serve.
    unused: experts without a token. aux_loss: as added to the loss.
    """
    load = load_of(routing, num_experts).double()
    served = load.sum().clamp(min=1)
    assigned = real.reshape(-1).index_select(0, routing.token).sum().clamp(min=1)
    entropy = torch.special.entr(load / served).sum()
    metrics = {
        "max_over_mean": load.max() * num_experts / served,
        "entropy": entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy),
        "dropped": 1 - load.sum() / assigned,
        "weight": routing.weight.detach().double().sum() / served,
        "unused": (load == 0).sum(),
        "aux_loss": routing.aux_loss.detach(),
    }
    return metrics | routing.report
