"""What a layer of experts computes, token by token, straight from the definitions: dispatch is held against it.

T tokens, D width, F hidden width, N segments
"""

import torch
from torch import Tensor

from models.experts import ExpertLayer, Experts, StackedExperts
from routers.routing import Routing


def activate(x: Tensor, name: str) -> Tensor:
    if name == "relu":
        return x.clamp(min=0)
    return x * (1 + torch.erf(x / 2**0.5)) / 2 if name == "gelu" else x * torch.sigmoid(x)


def inner(x: Tensor, w_in: Tensor, w_gate: Tensor | None, name: str) -> Tensor:
    return activate(x @ w_in, name) if w_gate is None else activate(x @ w_gate, name) * (x @ w_in)


def one_expert(experts: ExpertLayer, expert: int, x: Tensor, name: str) -> Tensor | None:
    """One expert on one row (D,); None if nobody wrote down here what such experts are."""
    if isinstance(experts, StackedExperts):
        y = x
        for sublayer in experts.sublayers:
            assert isinstance(sublayer, Experts)
            centred = y - y.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt() * sublayer.get_parameter("gain")[expert]
            w_gate = None if sublayer.w_gate is None else sublayer.w_gate[expert]
            y = y + inner(normed, sublayer.w_in[expert], w_gate, name) @ sublayer.w_out[expert]
        return y - x
    if not isinstance(experts, Experts):
        return None
    return segmented(experts, [expert] * experts.segments, x, name)


def segmented(experts: Experts, of: list[int], x: Tensor, name: str) -> Tensor:
    """One row (D,) through experts cut into N segments, the n-th from expert of[n]."""

    def parts(weight: Tensor) -> list[Tensor]:
        return [weight[e, n] if experts.segments > 1 else weight[e] for n, e in enumerate(of)]

    w_in, w_out = torch.cat(parts(experts.w_in), -1), torch.cat(parts(experts.w_out), -1)
    return inner(x, w_in, None if experts.w_gate is None else torch.cat(parts(experts.w_gate), -1), name) @ w_out


def naive(x: Tensor, routing: Routing, experts: ExpertLayer, shared: Experts | None, name: str) -> Tensor | None:
    """The layer's output (T, D), one token after the other; None as of one_expert. name: of the activation."""
    outputs = []
    for token in range(len(x)):
        mine = [a for a, other in enumerate(routing.token.tolist()) if other == token]
        y = torch.zeros_like(x[token])
        if experts.segments > 1:
            assert isinstance(experts, Experts)
            whole = segmented(experts, [int(routing.expert[a]) for a in mine], x[token], name)
            weight = routing.weight[torch.tensor(mine)].repeat_interleave(len(whole) // experts.segments)
            y = y + weight * whole
        else:
            for a in mine:
                of_one = one_expert(experts, int(routing.expert[a]), x[token], name)
                if of_one is None:
                    return None
                y = y + routing.weight[a] * of_one
        if shared is not None:
            y = y + segmented(shared, [0], x[token], name)
        outputs.append(y)
    return torch.stack(outputs)
