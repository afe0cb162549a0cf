"""Checks of a layer's arithmetic against loops that are written out.

B batch, S sequence, T = B*S tokens, D width, E experts, N segments
"""

import torch

from models.dispatch import choose_path
from routers.certificate.findings import (
    EXACT,
    FAILED,
    NOT_APPLICABLE,
    ROUNDING,
    TRIES,
    Finding,
    distance,
    gradients,
    judged,
    layers,
    projected,
)
from routers.certificate.oracle import naive
from routers.certificate.trial import GROUP, Case, gates, rows_of
from routers.routing import Routing


def equals_the_loop(case: Case, dtype: torch.dtype, path: str, tolerance: float) -> Finding:
    """The layer's output and all gradients against routers.oracle, with the plan of the batch."""
    furthest = 0.0
    for seed in range(3):
        model = case.model(seed, training=seed < 2, dtype=dtype, path=path)
        batch, plans = model.prepare(case.batch(seed, padding=seed))
        for layer, ffn in layers(model):
            hidden = case.hidden(seed).to(dtype).requires_grad_()
            inputs = [hidden, *(p for p in ffn.parameters() if p.requires_grad)]
            y, routing = ffn(hidden, batch.tokens, plans.get(layer))
            ours = gradients(projected(y, routing.aux_loss), inputs)
            routing = ffn.router(hidden, batch.tokens)
            expected = naive(hidden.flatten(0, 1), routing, ffn.experts, ffn.shared, case.activation)
            if expected is None:
                return Finding(NOT_APPLICABLE, f"no loop is written for {type(ffn.experts).__name__}")
            expected = expected.view_as(y)
            theirs = gradients(projected(expected, routing.aux_loss), inputs)
            pairs = zip([y, *ours], [expected, *theirs])
            furthest = max([furthest, *(distance(one, other) for one, other in pairs)])
    return judged(furthest <= tolerance, f"largest relative difference {furthest:.1e} of {tolerance:.0e} allowed")


def equals_the_loop_on_a_gpu(case: Case) -> Finding:
    """The working path in bf16 on a GPU against the loop in float32 on the CPU, of the largest value."""
    if not torch.cuda.is_available():
        return Finding(NOT_APPLICABLE, "no GPU here")
    device, furthest = torch.device("cuda"), 0.0
    for seed in range(TRIES):
        model = case.model(seed, dtype=torch.float32)
        batch = model.prepare(case.batch(seed))[0]
        for _, ffn in layers(model):
            hidden = case.hidden(seed).float()
            expected, routing = ffn(hidden, batch.tokens, None)
            ffn.to(device).path = choose_path("auto", device, torch.bfloat16)
            there = batch.apply(lambda t: t.to(device)).tokens
            with torch.autocast("cuda", torch.bfloat16):
                y, moved = ffn(hidden.to(device), there, ffn.router.plan(there))
            if not torch.equal(moved.expert.cpu(), routing.expert):
                return Finding(FAILED, "on the GPU other experts are chosen")
            furthest = max(furthest, float(((y.float().cpu() - expected).abs().max() / expected.abs().max()).detach()))
            ffn.cpu()
    return judged(furthest <= 3e-2, f"largest difference {furthest:.1e} of the largest value, 3e-02 allowed")


def one_expert_is_dense(case: Case) -> Finding:
    """With one expert, or with all experts equal where one is refused: the summed weight times the plain FFN."""
    furthest, number, how = 0.0, 1, "E = 1"
    try:
        case.first_model(0, 1, small=False)
    except ValueError as refused:
        number, how = case.num_experts, f"equal experts (E = 1 is refused: {refused})"
    for seed in range(2):
        model = case.model(seed, seed < 1, num_experts=number)
        batch = model.prepare(case.batch(seed))[0]
        for _, ffn in layers(model):
            with torch.no_grad():
                for parameter in ffn.experts.parameters():
                    parameter.copy_(parameter[:1].expand_as(parameter))
                hidden = case.hidden(seed)
                y, routing = ffn(hidden, batch.tokens, None)
                x, everyone = hidden.flatten(0, 1), torch.arange(batch.target.numel())
                first = torch.zeros(len(everyone) * ffn.experts.segments, dtype=torch.int64)
                whole = Routing(everyone.repeat_interleave(ffn.experts.segments), first, first + 1.0, y.new_zeros(()))
                plain = naive(x, whole, ffn.experts, None, case.activation)
                if plain is None:
                    return Finding(NOT_APPLICABLE, f"no loop is written for {type(ffn.experts).__name__}")
                weight = gates(routing, len(everyone), ffn.router).sum(-1)  # (T, N)
                served = weight[weight > 0]
                if number == 1 and len(served) and served.std() < EXACT < abs(float(served.mean()) - 1):
                    return Finding(FAILED, f"{how}: every weight is {float(served.mean()):.3g}, which is not learned")
                parts = plain.unflatten(1, (ffn.experts.segments, -1)) * weight[..., None]
                shared = 0 if ffn.shared is None else ffn.shared.dense(x)
                furthest = max(furthest, distance(y.flatten(0, 1), parts.flatten(1) + shared))
    return judged(furthest <= EXACT, f"{how}: largest relative difference {furthest:.1e}")


def same_at_any_accumulation(case: Case) -> Finding:
    """Two groups at once or one after the other, the last one padded: outputs, gradients, the mean auxiliary loss."""
    furthest = 0.0
    for seed in range(TRIES):
        model = case.model(seed)
        batch, hidden = model.prepare(case.batch(seed, padding=3 * seed))[0], case.hidden(seed, alike=seed % 2 * 1.0)
        for _, ffn in layers(model):
            learned = [p for p in ffn.parameters() if p.requires_grad]
            y, routing = ffn(hidden, batch.tokens, None)
            whole = [y, routing.aux_loss, *gradients(projected(y, 2 * routing.aux_loss), learned)]
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos() / len(y)
            parts, outputs, losses = [torch.zeros_like(p) for p in learned], [], []
            for rows in torch.arange(2 * GROUP).split(GROUP):
                part, routing = ffn(hidden[rows], rows_of(batch, rows).tokens, None)
                found = gradients((part * weights[rows]).sum() + routing.aux_loss, learned)
                parts = [total + more for total, more in zip(parts, found)]
                outputs.append(part)
                losses.append(routing.aux_loss)
            pieces = [torch.cat(outputs), torch.stack(losses).mean(), *parts]
            furthest = max([furthest, *(distance(one, other) for one, other in zip(pieces, whole))])
    return judged(furthest <= ROUNDING, f"largest relative difference {furthest:.1e}")
