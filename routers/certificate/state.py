"""Checks of state and randomness: what changes when, and what a checkpoint keeps."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.batches import Batch
from models.feedforward import SparseFeedForward
from routers.certificate.findings import NOT_APPLICABLE, TRIES, Finding, distance, judged, layers, listed, logits, route
from routers.certificate.trial import Case, changes, state_of, watched


def evaluation_is_pure(case: Case) -> Finding:
    """Twice the same, whatever the source of noise; nothing changed; no global generator, also not at construction."""
    moved, changed, touched = 0.0, set(), set()
    for seed in range(TRIES):
        with watched() as generators:
            model = case.model(seed, training=False)
            if seed == 0:
                case.new_model(seed, case.num_experts)
            before, batch = state_of(model), case.batch(seed)
            first, again = logits(model, batch), logits(model, batch)
            otherwise = logits(model, case.batch(seed, keys=1))
            moved = max(moved, distance(again, first), distance(otherwise, first))
            changed |= set(changes(before, state_of(model)))
        touched |= set(generators)
    return judged(
        moved == 0 and not changed and not touched,
        f"largest difference {moved:.1e}" + listed("changed", changed) + listed("global generators touched", touched),
    )


def training_keeps_state(case: Case) -> Finding:
    """Forward, backward and recomputation change no state; that is after_step's. No global generator is touched."""
    changed, touched = set(), set()
    for seed in range(TRIES):
        with watched() as generators:
            model = case.model(seed)
            batch, _ = model.prepare(case.batch(seed))
            hidden, before = case.hidden(seed).requires_grad_(), state_of(model)
            for _, ffn in layers(model):

                def forward(x: Tensor, ffn: SparseFeedForward = ffn, batch: Batch = batch) -> tuple[Tensor, Tensor]:
                    y, routing = ffn(x, batch.tokens, None)
                    return y, routing.aux_loss

                y, aux_loss = checkpoint(forward, hidden, use_reentrant=False)
                (y.sum() + aux_loss).backward()
            changed |= set(changes(before, state_of(model)))
            for router in model.routers.values():
                router.after_step(torch.ones(case.num_experts, dtype=torch.int64), 0.5)
        touched |= set(generators)
    text = "forward and its recomputation change nothing" if not changed else "forward" + listed("changed", changed)
    return judged(not changed and not touched, text + listed("global generators touched", touched))


def state_matters(case: Case) -> Finding:
    """If after_step changes state, some token is routed otherwise for it."""
    changed, moved = set(), 0.0
    for seed in (0, 2):
        before, after = case.model(seed), case.model(seed)
        for router in after.routers.values():
            load = torch.ones(case.num_experts, dtype=torch.int64)
            load[0] = 100
            for step in range(400):
                router.after_step(load, (step + 1) / 400)
        changed |= set(changes(state_of(before), state_of(after)))
        batch, hidden = before.prepare(case.batch(seed))[0], 0.2 * case.hidden(seed)
        for layer, ffn in before.sparse.items():
            pair = [route(f, hidden, batch)[1] > 0 for f in (ffn, after.sparse[layer])]
            moved = max(moved, float((pair[0] != pair[1]).flatten(2).any(-1).double().mean()))
    if not changed:
        return Finding(NOT_APPLICABLE, "training changes no state outside the optimizer")
    return judged(moved > 0, f"what training changes moves {moved:.0%} of tokens{listed('state', changed)}")


def survives_checkpoint(case: Case) -> Finding:
    """Its state, loaded into a router made from another seed, gives the same routing; no tensor stands beside it."""
    moved, outside = 0.0, set()
    for seed in (0, 1):
        for training in (True, False):
            model, other = case.model(seed, training), case.model(100, training)
            for layer, router in model.routers.items():
                held = {name for name, value in state_of(router).items() if isinstance(value, Tensor)}
                outside |= {name.lstrip(".") for name in held} - router.state_dict().keys()
                other.routers[layer].load_state_dict({k: v.clone() for k, v in router.state_dict().items()})
            batch, _ = model.prepare(case.batch(seed))
            for layer, ffn in layers(model):
                hidden = case.hidden(seed)
                pair = [route(f, hidden, batch)[1] for f in (ffn, other.sparse[layer])]
                moved = max(moved, distance(pair[1], pair[0]))
    text = f"largest difference {moved:.1e}" + listed("not in the checkpoint", outside)
    return judged(moved == 0 and not outside, text)
