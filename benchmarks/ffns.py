"""What benchmarks.layer times: one problem, and the ways to solve it, each checked against float32 first.

T tokens, D width, F hidden width, E experts
"""

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from data.randomness import generator
from models.dispatch import choose_path, dispatch
from models.experts import Experts
from routers.routing import Plan, Routing, Site, make_plan, one_each
from routers.tables import Keys, balanced_table

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of output and every gradient, by norm
VOCABULARY = 8192


class Way(NamedTuple):
    forward: Callable[[Tensor], Tensor]  # (T, D) -> (T, D)
    parameters: Sequence[Tensor]
    in_our_layout: Callable[[list[Tensor]], list[Tensor]] = list  # gradients of these as those of Experts' parameters


class Problem:
    """x (T, D) with the expert of each row: Zipf tokens hashed by a balanced table, order and offsets made beforehand.

    Rows are of size 1, weights keep them so. On a GPU in bf16, on a CPU in float32.
    """

    def __init__(self, tokens: int, width: int, hidden: int, experts: int, activation: str, device: torch.device):
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        draws = generator("layer", tokens, width, hidden, experts)
        self.x = torch.randn(tokens, width, generator=draws).to(device, self.dtype).requires_grad_()
        self.target = torch.randn(tokens, width, generator=draws).to(device, self.dtype)  # the output's gradient
        self.experts = Experts(experts, width, hidden, activation)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=draws)
        self.experts = self.experts.to(device, self.dtype)
        self.floor = Experts(1, width, hidden, activation).to(device, self.dtype)
        self.floor.load_state_dict({name: value[:1] for name, value in self.experts.state_dict().items()})
        self.routing = routing_of(tokens, experts, draws, device)
        self.plan = make_plan(self.routing.expert, experts)
        self.path = choose_path("auto", device, self.dtype, tokens * width * hidden)
        self.flops = 3 * tokens * self.experts.flops()  # forward and backward

    def dense(self, x: Tensor) -> Tensor:
        """Expert 0 on all rows: the floor, with parameters of its own."""
        return self.floor.dense(x)

    def ours(self, x: Tensor, plan: Plan | None, path: str | None = None) -> Tensor:
        return dispatch(x, self.routing, plan, self.experts, path or self.path)

    def grouped(self, x: Tensor) -> Tensor:
        """As anybody would write it: sort in the step, F.grouped_mm, back by the inverse order."""
        expert = self.routing.expert
        order = expert.argsort(stable=True)
        number = torch.arange(len(self.experts.w_in), device=expert.device)
        offsets = torch.searchsorted(expert[order], number, right=True).to(torch.int32)
        y = self.experts(x[order], lambda rows, weight, bias: grouped_mm(rows, weight, offs=offsets))
        return y[order.argsort()]

    def loop(self, x: Tensor) -> Tensor:
        """One expert after the other, found by a mask."""
        experts = zip(*(w.unbind(0) for w in self.experts.parameters()))
        places = [(self.routing.expert == each).nonzero()[:, 0] for each in range(len(self.experts.w_in))]
        y = torch.cat([self.one_ffn(x[rows], weights) for rows, weights in zip(places, experts)])
        return y[torch.cat(places).argsort()]

    def one_ffn(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        inner = x @ weights[0]
        inner = self.experts.activation(inner if len(weights) == 2 else x @ weights[2])
        return (inner if len(weights) == 2 else inner * (x @ weights[0])) @ weights[1]


def routing_of(tokens: int, experts: int, draws: torch.Generator, device: torch.device) -> Routing:
    counts = 1e9 / torch.arange(1, VOCABULARY + 1)
    none: Any = None  # a balanced table asks its site for the number of experts alone
    site = Site(0, experts, 0, VOCABULARY, counts.long(), none, none, 1, 0, 1, (0,))
    table = balanced_table(Keys(counts.long(), site, draws))[:, 0]
    word = torch.multinomial(counts, tokens, replacement=True, generator=draws)
    expert = table[word].to(device)[None]  # (1, T): one sequence
    return one_each(expert, torch.ones_like(expert))


def gradients(problem: Problem, way: Way) -> list[Tensor]:
    """Output and gradients of x and every parameter: forward and backward of one step."""
    y = way.forward(problem.x)
    return [y.detach(), *torch.autograd.grad(y, [problem.x, *way.parameters], problem.target)]


def reference(problem: Problem, dense: bool) -> list[Tensor]:
    """The same of the same values in float32, by the loop."""
    same = copy(problem)
    same.experts, same.floor = deepcopy(problem.experts).float(), deepcopy(problem.floor).float()
    same.x, same.target = problem.x.detach().float().requires_grad_(), problem.target.float()
    owner, forward = (same.floor, same.dense) if dense else (same.experts, same.loop)
    return gradients(same, Way(forward, list(owner.parameters())))


def error_of(problem: Problem, way: Way, found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest |found - wanted| / |wanted| by norm, of that way. ValueError above TOLERANCE."""
    y, dx, *others = found
    pairs = ((a.float(), b.float()) for a, b in zip([y, dx, *way.in_our_layout(others)], wanted, strict=True))
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
    if not error <= TOLERANCE[problem.dtype]:
        raise ValueError(f"off by {error:.1e}, {TOLERANCE[problem.dtype]:.0e} allowed")
    return error


def transformers_experts(problem: Problem) -> Way:
    """transformers' grouped_mm experts on the same values, (E, F, D) as they want them. ImportError without it."""
    from transformers.integrations.moe import grouped_mm_experts_forward  # type: ignore[reportMissingImports]

    first, last, gated = stacked(problem)
    holder: Any = nn.Module()
    holder.gate_up_proj, holder.down_proj = nn.Parameter(first), nn.Parameter(last)
    holder.up_proj, holder.num_experts, holder.act_fn = holder.gate_up_proj, len(first), problem.experts.activation
    holder.has_gate, holder.has_bias, holder.is_transposed, holder.is_concatenated = True, False, False, True
    holder._apply_gate = _swiglu if gated else problem.experts.activation
    return _called(problem, holder, lambda *given: grouped_mm_experts_forward(holder, *given))


def liger_experts(problem: Problem) -> Way:
    """Liger's experts, SwiGLU alone. ImportError without it; ValueError for another activation."""
    from liger_kernel.transformers.swiglu import LigerExperts  # type: ignore[reportMissingImports]

    first, last, gated = stacked(problem)
    if not gated:
        raise ValueError("SwiGLU alone")
    sizes = {"num_experts": len(first), "moe_intermediate_size": last.shape[2], "hidden_size": last.shape[1]}
    holder: Any = LigerExperts(SimpleNamespace(**sizes, hidden_act="silu")).to(problem.device, problem.dtype)
    holder.gate_up_proj, holder.down_proj = nn.Parameter(first), nn.Parameter(last)
    return _called(problem, holder, holder)


def stacked(problem: Problem) -> tuple[Tensor, Tensor, bool]:
    experts = problem.experts
    first = [w.detach().mT for w in (experts.w_gate, experts.w_in) if w is not None]
    return torch.cat(first, 1).contiguous(), experts.w_out.detach().mT.contiguous(), experts.w_gate is not None


def unstacked(problem: Problem, stacked: list[Tensor]) -> list[Tensor]:
    """The reverse of stacked, in the order of Experts' parameters."""
    first, last = (each.mT for each in stacked)
    gated = problem.experts.w_gate is not None
    parts = {"w_out": last} | dict(zip(("w_gate", "w_in") if gated else ("w_in",), first.chunk(1 + gated, -1)))
    return [parts[name] for name, _ in problem.experts.named_parameters()]


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return nn.functional.silu(gate) * up


def _called(problem: Problem, holder: Any, forward: Callable[..., Tensor]) -> Way:
    """forward(x) with a token's one expert and weight 1, its parameters in the place of ours."""
    chosen = problem.routing.expert[:, None]
    ones = torch.ones(len(chosen), 1, device=problem.device, dtype=problem.dtype)

    return Way(lambda x: forward(x, chosen, ones), [holder.gate_up_proj, holder.down_proj], partial(unstacked, problem))
