"""Checks of scores and gradients: what learns, stays finite, and does not depend on the number format."""

import torch

from routers.certificate.findings import (
    FAILED,
    TRIES,
    Finding,
    distance,
    gradients,
    judged,
    layers,
    listed,
    projected,
    route,
)
from routers.certificate.trial import Case


def learns_where_it_should(case: Case) -> Finding:
    """Every parameter of a router gets a gradient; without parameters there is no loss; buffers get none."""
    reached: dict[str, float] = {}
    for seed in range(TRIES):
        model = case.model(seed)
        batch = model.prepare(case.batch(seed, rows=8))[0]
        for layer, ffn in layers(model):
            learned = {name: p for name, p in ffn.router.named_parameters() if p.requires_grad}
            y, routing = ffn(case.hidden(seed, rows=8), batch.tokens, None)
            if any(buffer.requires_grad for buffer in ffn.router.buffers()):
                return Finding(FAILED, "a buffer gets a gradient")
            weighed = bool(((routing.weight != 0) & (routing.weight != 1)).any())
            if learned and weighed and not routing.weight.requires_grad:
                return Finding(FAILED, "weights are neither 0 nor 1, and no gradient flows through them")
            if not list(ffn.router.parameters()) and (float(routing.aux_loss) != 0 or routing.weight.requires_grad):
                return Finding(FAILED, "there is nothing to learn, but a loss or a gradient through the weights")
            found = gradients(projected(y, routing.aux_loss), list(learned.values()))
            for name, gradient in zip(learned, found):
                reached[f"{layer}.{name}"] = max(reached.get(f"{layer}.{name}", 0.0), float(gradient.abs().max()))
    idle = {name for name, size in reached.items() if not size > 0}
    text = (
        f"{len(reached)} parameters, smallest gradient {min(reached.values()):.1e}" if reached else "nothing to learn"
    )
    return judged(not idle, text + listed("without a gradient", idle))


def gradients_stay_finite(case: Case) -> Finding:
    """In float32, at uniform (zero input; zero parameters), tied (equal rows) and saturated (times 1e4) scores, and
    where a gate (E, D) gives all experts equal loads."""
    broken, largest = set(), 0.0
    for seed in range(TRIES):
        hidden = case.hidden(seed).float()
        tied = hidden[:1, :1].expand_as(hidden)
        turns = torch.arange(hidden[..., 0].numel()).view(hidden.shape[:2]) % case.num_experts
        even = torch.nn.functional.one_hot(turns, max(case.num_experts, hidden.shape[-1]))[..., : hidden.shape[-1]]
        named = {"zero input": 0 * hidden, "equal rows": tied, "saturated": 1e4 * hidden}
        named |= {"even loads": even.float(), "zero parameters": hidden}
        for training in (True, False):
            model = case.model(seed, training, dtype=torch.float32)
            batch = model.prepare(case.batch(seed, padding=seed))[0]
            for _, ffn in layers(model):
                for name, x in named.items():
                    if name == "even loads":
                        with torch.no_grad():
                            for parameter in ffn.router.parameters():
                                if parameter.shape == (case.num_experts, hidden.shape[-1]):
                                    torch.nn.init.eye_(parameter)
                    if name == "zero parameters":  # the last
                        with torch.no_grad():
                            for parameter in ffn.router.parameters():
                                parameter.zero_()
                    x = x.clone().requires_grad_()
                    y, routing = ffn(x, batch.tokens, None)
                    inputs = [x, *(p for p in ffn.parameters() if p.requires_grad)]
                    found = [y, routing.weight, routing.aux_loss, *gradients(projected(y, routing.aux_loss), inputs)]
                    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
                        broken.add(name)
                    largest = max(
                        [largest, *(float(tensor.detach().abs().max()) for tensor in found if tensor.numel())]
                    )
    return judged(not broken, f"largest value {largest:.1e}" + listed("not finite at", broken))


def ties_are_stable(case: Case) -> Finding:
    """Equal scores choose the lowest ids; float32 and float64 choose alike where both are exact, ties among it."""
    differing, wrong, depends = 0.0, 0.0, False
    for seed in range(TRIES):
        models = [case.model(seed, False, dtype) for dtype in (torch.float64, torch.float32)]
        batch = models[0].prepare(case.batch(seed))[0]
        coarse = case.hidden(seed).round().clamp(-1, 1)  # scores are multiples of 1/4: exact, with many ties
        for layer, ffn in layers(models[0]):
            other = models[1].sparse[layer]
            before = route(ffn, coarse, batch)[1] > 0
            with torch.no_grad():
                for parameter, narrow in zip(ffn.router.parameters(), other.router.parameters()):
                    parameter.copy_((parameter * 2).round().clamp(-1, 1) / 4)
                    narrow.copy_(parameter)
            wide, narrow = route(ffn, coarse, batch)[1] > 0, route(other, coarse.float(), batch)[1] > 0
            differing = max(differing, float((wide != narrow).flatten(2).any(-1).double().mean()))
            decided = not torch.equal(before, route(ffn, -coarse, batch)[1] > 0) or not torch.equal(before, wide)
            if not decided or seed % 2:  # fixed, or what followed training decides beside the scores
                continue
            depends = True
            with torch.no_grad():
                for parameter in ffn.router.parameters():
                    parameter.zero_()
            tied = route(ffn, 0 * coarse, batch)[1].sum(2) > 0  # (B, S, E)
            lowest = torch.arange(tied.shape[-1]) < tied.sum(-1, keepdim=True)
            wrong = max(wrong, float((tied != lowest).any(-1).double().mean()))
    text = f"float32 differs on {differing:.0%} of tokens"
    text += f", ties on {wrong:.0%} not to the lowest ids" if depends else "; no scores decide in evaluation"
    return judged(differing == 0 and wrong == 0, text)


def scores_are_wide(case: Case) -> Finding:
    """Under bf16 autocast a router decides and weighs as without, in at least float32."""
    moved = 0.0
    for seed in range(TRIES):
        model = case.model(seed, training=seed < 2, dtype=torch.float32)
        batch = model.prepare(case.batch(seed))[0]
        for _, ffn in layers(model):
            hidden = case.hidden(seed).float()
            routing, plain = route(ffn, hidden, batch)
            with torch.autocast("cpu", torch.bfloat16):
                lowered, low = route(ffn, hidden, batch)
            half, _ = route(ffn, hidden.bfloat16(), batch)
            if torch.bfloat16 in (lowered.weight.dtype, half.weight.dtype, lowered.aux_loss.dtype, half.aux_loss.dtype):
                return Finding(FAILED, "weights or loss in bf16")
            moved = max(moved, distance(low, plain), distance(lowered.aux_loss, routing.aux_loss))
    return judged(moved < 1e-6, f"bf16 autocast moves weights and loss by {moved:.1e}")
