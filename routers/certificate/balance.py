"""Checks of balance: loads as promised, and the load-balancing loss as published.

B batch, S sequence, E experts, N segments, G routing groups
"""

import math

import torch
from torch import Tensor

from data.batches import Batch
from models.feedforward import SparseFeedForward
from routers.certificate.findings import (
    EXACT,
    FAILED,
    NOT_APPLICABLE,
    TRIES,
    Finding,
    distance,
    judged,
    layers,
    route,
)
from routers.certificate.trial import GROUP, Case
from routers.routing import Balancing, load_of

STREAM = 400  # optimizer steps of a drifting stream


def loads(case: Case) -> Finding:
    """Loads of a routing group: equal to one token where that is promised, reported for all."""
    promised, spread, fullest, violated = False, 0, 0.0, 0.0
    for seed in range(TRIES):
        model = case.model(seed)
        batch = model.prepare(case.batch(seed, padding=seed))[0]
        for _, ffn in layers(model):
            routing, served = route(ffn, case.hidden(seed, alike=seed % 2 * 1.0), batch)
            load = (served > 0).unflatten(0, (-1, GROUP)).sum((1, 2, 3))  # (groups, E)
            violated = max(violated, float(routing.report.get("plan_violation", torch.zeros(()))))
            if ffn.router.even_loads:
                promised, spread = True, max(spread, int((load.amax(1) - load.amin(1)).max()))
            fullest = max(fullest, float((load.amax(1) / load.double().mean(1).clamp(min=1e-9)).max()))
    promise = f"at most {spread} apart, promised 1" if promised else "no promise of even loads"
    if violated > 1e-3:
        return Finding(FAILED, f"the plan's sums deviate by {violated:.1e}, 1e-3 allowed")
    return judged(spread <= 1, f"fullest expert {fullest:.2f} times the mean in training; {promise}")


def table_reaches_its_bound(case: Case) -> Finding:
    """A balanced table's fullest expert, on the text that it was made for, at most 1 % above what no table can beat."""
    worst, bounds = 0.0, set()
    for seed in range(2):
        model = case.model(seed)
        for _, ffn in layers(model):
            bound, segments = ffn.router.load_bound, ffn.router.segments
            if bound is None:
                continue
            served = sum(served_text(ffn, case), torch.zeros(segments, case.num_experts))  # (N, E)
            fullest = float((served.amax(1) / served.mean(1)).max())
            worst = max(worst, fullest / bound)
            bounds.add(f"{fullest:.3f} times the mean, {bound:.3f} is possible")
    if not bounds:
        return Finding(NOT_APPLICABLE, "no bound is promised")
    return judged(worst <= 1.01, f"fullest expert {max(bounds)}")


def served_text(ffn: SparseFeedForward, case: Case) -> list[Tensor]:
    """Loads (N, E) of each batch of the training text."""
    text = ffn.router.site.training_text
    assert text is not None
    loads = []
    for batch in text():
        tokens = batch.tokens
        hidden = torch.zeros(*tokens.id.shape, case.settings.d_model, dtype=torch.float64)
        with torch.no_grad():
            expert = ffn.router(hidden, tokens).expert.view(-1, ffn.router.segments)
        loads.append(torch.nn.functional.one_hot(expert, case.num_experts).sum(0).float())
    return loads


def evens_a_drifting_stream(case: Case) -> Finding:
    """after_step lowers the fullest expert's share on a stream whose scores drift, against the same without it."""
    steered: dict[bool, list[float]] = {True: [], False: []}
    for follows in steered:
        model = case.model(0)
        for layer, ffn in layers(model):
            if not ffn.router.follows_load:
                continue
            drift, other = case.hidden(("drift", layer), rows=2)[:, 0]
            for step in range(STREAM):
                batch = model.prepare(case.batch(step % 8))[0]
                turn = math.pi / 2 * step / STREAM
                hidden = 0.1 * (case.hidden(step % 8) + 2 * (math.cos(turn) * drift + math.sin(turn) * other))
                load = load_of(route(ffn, hidden, batch)[0], case.num_experts)
                if follows:
                    ffn.router.after_step(load, (step + 1) / STREAM)
                if step >= STREAM // 2:
                    steered[follows].append(float(load.max() / load.double().mean()))
    if not steered[True]:
        return Finding(NOT_APPLICABLE, "after_step does not follow the loads")
    without, withal = (sum(steered[follows]) / len(steered[follows]) for follows in (False, True))
    text = f"fullest expert {withal:.2f} times the mean, {without:.2f} without after_step"
    return judged(withal < without, text)


def loss_as_published(case: Case) -> Finding:
    """aux_loss against the formula written out in Python's own numbers: by layer, without padding, before dropping."""
    furthest, promised, silent = 0.0, False, 0.0
    for seed in range(TRIES):
        model = case.model(seed)
        batch = model.prepare(case.batch(seed, padding=5 * seed))[0]
        for _, ffn in layers(model):
            hidden = case.hidden(seed, alike=seed % 2 * 1.0)
            aux_loss, balancing = ffn.router(hidden, batch.tokens).aux_loss, ffn.router.balancing(hidden, batch.tokens)
            if balancing is None:
                silent = max(silent, float(aux_loss.detach().abs()))
                continue
            if balancing.coef > 0 and not aux_loss.requires_grad:
                return Finding(FAILED, "no gradient flows through the loss")
            promised, expected = True, torch.tensor(by_the_formula(balancing, batch), dtype=aux_loss.dtype)
            furthest = max(furthest, distance(aux_loss, expected))
    if not promised:
        return Finding(NOT_APPLICABLE, "a loss of its own, without a promise" if silent else "no loss")
    return judged(furthest <= EXACT, f"largest difference from the formula {furthest:.1e}")


def by_the_formula(balancing: Balancing, batch: Batch) -> float:
    """The mean over groups of coef * E * sum_i f_i P_i + z_coef * mean logsumexp(s)^2, one token after the other."""
    losses = []
    for first in range(0, len(batch.target), GROUP):
        group = slice(first, first + GROUP)
        real = batch.tokens.real[group].flatten().tolist()
        scores = [s for s, kept in zip(balancing.scores[group].flatten(0, 1).tolist(), real) if kept]
        share = [p for p, kept in zip(balancing.probability[group].flatten(0, 1).tolist(), real) if kept]
        if not scores:
            losses.append(0.0)
            continue
        experts = range(len(scores[0]))
        chosen = [e for s in scores for e in sorted(experts, key=lambda e, s=s: -s[e])[: balancing.choices]]
        dot = sum(chosen.count(e) / len(chosen) * sum(p[e] for p in share) / len(share) for e in experts)
        squares = sum(math.log(sum(math.exp(x) for x in s)) ** 2 for s in scores) / len(scores)
        losses.append(balancing.coef * len(experts) * dot + balancing.z_coef * squares)
    return sum(losses) / len(losses)
