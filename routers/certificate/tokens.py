"""Checks of what becomes of every token: weights, padding, loads, and training against evaluation.

B batch, S sequence, T = B*S tokens, D width, E experts, N segments
"""

from collections.abc import Iterator

import torch

from data.batches import Batch
from data.tokenizer import BEGIN
from models.feedforward import SparseFeedForward
from routers.certificate.findings import (
    EXACT,
    FAILED,
    MODES,
    OK,
    ROUNDING,
    TRIES,
    Finding,
    distance,
    judged,
    layers,
    listed,
    route,
)
from routers.certificate.trial import GROUP, LENGTH, Case
from routers.routing import Routing, load_metrics


def accounts_for_every_token(case: Case) -> Finding:
    """Indices in range, weights finite and not negative, fan-out as promised, padding 0 and without any effect."""
    broken, dropped = set(), dict.fromkeys(MODES, 0.0)
    for mode, training in MODES.items():
        for seed in range(TRIES):
            model = case.model(seed, training)
            padding = (0, 3, 5, GROUP * LENGTH)[seed % 4]
            batch = model.prepare(case.batch(seed, padding=padding))[0]
            for _, ffn in layers(model):
                hidden = case.hidden(seed, alike=1.0)
                routing, served = route(ffn, hidden, batch)
                broken |= set(broken_promises(routing, ffn, batch))
                changed = refilled(case, batch, seed)
                filler = torch.where(batch.tokens.real[..., None], hidden, 9.0)
                other, otherwise = route(ffn, filler, changed)
                if distance(other.aux_loss, routing.aux_loss) > EXACT:
                    broken.add("padding moves the auxiliary loss")
                if distance(otherwise, served) > EXACT:
                    broken.add("padding moves the routing")
                if float(served[~batch.tokens.real].sum()) > 0:
                    broken.add("padding has weight")
                idle = (served.sum((-1, -2)) == 0) & batch.tokens.real
                dropped[mode] = max(dropped[mode], float(idle.sum() / batch.tokens.real.sum()))
    text = ", ".join(f"{mode} serves all but at most {share:.1%}" for mode, share in dropped.items())
    return judged(not broken, text + listed("broken", broken))


def refilled(case: Case, batch: Batch, seed: int) -> Batch:
    """Other tokens, and other noise, where there is padding."""
    other, real = case.batch(("padding", seed)).tokens, batch.tokens.real
    fields = {name: torch.where(real, getattr(batch.tokens, name), getattr(other, name)) for name in FILLED}
    if batch.tokens.predicted is not None:
        fields["predicted"] = torch.where(real, batch.tokens.predicted, BEGIN)
    return batch._replace(tokens=batch.tokens._replace(**fields))


FILLED = ("id", "previous", "next")


def broken_promises(routing: Routing, ffn: SparseFeedForward, batch: Batch) -> Iterator[str]:
    token, expert, weight, tokens = routing.token, routing.expert, routing.weight, batch.target.numel()
    experts = ffn.experts.num_experts
    if not (token.dim() == 1 and token.shape == expert.shape == weight.shape):
        yield "token, expert and weight differ in shape"
    if token.dtype != torch.int64 or expert.dtype != torch.int64 or weight.dtype not in (torch.float32, torch.float64):
        yield "types"
    if bool(((token < 0) | (token >= tokens) | (expert < 0) | (expert >= experts)).any()):
        yield "an index is out of range"
    if not bool(torch.isfinite(weight).all() and (weight >= 0).all() and torch.isfinite(routing.aux_loss)):
        yield "a weight or the loss is negative or not finite"
    if routing.fan_out is not None and not torch.equal(token, torch.arange(tokens).repeat_interleave(routing.fan_out)):
        yield "fan_out"
    figures = load_metrics(routing._replace(report={}), batch.tokens.real, experts)
    if any(name in figures or value.requires_grad or value.dim() for name, value in routing.report.items()):
        yield "a report shadows a metric, or is no detached scalar"


def routes_alike(case: Case) -> Finding:
    """Training and evaluation route alike, or that they do not is declared and found."""
    hidden_share, declared, shares = 0.0, False, [0.0]
    for seed in range(2 * TRIES):
        models = [case.model(seed, training) for training in MODES.values()]
        batch = models[0].prepare(case.batch(seed))[0]
        hidden = case.hidden(seed, alike=seed // 2 % 2 * 2.0)
        for layer, ffn in layers(models[0]):
            one, other = (route(f, hidden, batch)[1] for f in (ffn, models[1].sparse[layer]))
            share = float(((one - other).abs() > ROUNDING).flatten(2).any(-1).double().mean())
            if ffn.router.trains_differently:
                declared = True
                shares.append(share)
            else:
                hidden_share = max(hidden_share, share)
    if hidden_share > 0:
        return Finding(FAILED, f"{hidden_share:.0%} of tokens differ, and trains_differently is not declared")
    if declared and max(shares) == 0:
        return Finding(FAILED, "trains_differently is declared, but no token is routed otherwise")
    return Finding(OK, f"declared: up to {max(shares):.0%} of tokens differ" if declared else "no token differs")
