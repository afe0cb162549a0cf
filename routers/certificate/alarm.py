"""The leak alarm: on a language of known entropy nothing gets below the entropy that does not see the future."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.batches import Batch
from data.markov import Markov
from data.randomness import mix
from data.tokenizer import BEGIN
from models.transformer import Transformer
from routers.certificate.findings import CONFIRMED, FAILED, OK, Finding
from routers.certificate.trial import LENGTH, Case, batch_of
from routers.routing import load_of

STEPS, ROWS, HELD_OUT, ERRORS = 150, 32, 512, 4.0  # steps of windows; windows held out; standard errors


def leak_alarm(case: Case) -> Finding:
    """Train for some seconds and compare with the truth on held-out windows: cross-entropy minus -log P, by window.

    Its mean is a divergence, at least 0, for whatever does not see the future, in evaluation and as in training.
    """
    language = Markov(symbols=8, end=0.05, sharpness=1.5, tokens=1, held_out=1, seed=0)
    model = trained(replace(case, routing_group=ROWS), language)  # one assignment a step, where those are costly
    below: dict[str, float] = {}
    for mode in ("evaluation", "training"):
        model.eval()
        for router in model.routers.values():
            router.train(mode == "training")
        mean, error = excess(model, language)
        below[mode] = -mean / error
        figure = f"{mean:+.3f} nats above the entropy of {language.entropy():.3f}"
        leaks = any(f"future in {mode}" in router.leaks for router in model.routers.values())
        if below[mode] > ERRORS and not leaks:
            return Finding(FAILED, f"in {mode} {figure}, {below[mode]:.0f} standard errors below: it sees the future")
        if mode == "evaluation":
            status, text = (CONFIRMED if below[mode] > ERRORS else OK), figure
    return Finding(
        status, f"{text}, {-below['evaluation']:+.0f} standard errors; as in training {-below['training']:+.0f}"
    )


def windows(language: Markov, split: str, number: int) -> Tensor:
    """(number, S+1) token ids that follow each other at stride S: ends are END, letters stand above BEGIN."""
    states = language.states(split)
    stream = torch.tensor([next(states) for _ in range(number * LENGTH + 1)])
    return torch.where(stream > 0, stream + BEGIN, stream).unfold(0, LENGTH + 1, LENGTH)


def batch_from(window: Tensor, step: int) -> Batch:
    real = torch.ones(len(window), LENGTH, dtype=torch.bool)
    return batch_of(window, real, mix(step, torch.arange(len(window))))


def trained(case: Case, language: Markov) -> Transformer:
    model = case.model(0, dtype=torch.float32, path="grouped_mm", small=True)
    text = windows(language, "train", STEPS * ROWS).split(ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step, window in enumerate(text):
        batch, plans = model.prepare(batch_from(window, step))
        output = model(batch.tokens, plans)
        (cross_entropy(output.logits.flatten(0, 1), batch.target.flatten()) + output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer, router in model.routers.items():
            router.after_step(load_of(output.routings[layer], case.num_experts), (step + 1) / STEPS)
    return model


@torch.no_grad()
def excess(model: Transformer, language: Markov) -> tuple[float, float]:
    """Nats per token above the true surprise on held-out text, the mean over windows, and its standard error."""
    differences = []
    for window in windows(language, "validation", HELD_OUT).split(ROWS):
        batch, plans = model.prepare(batch_from(window, 0))
        ce = cross_entropy(model(batch.tokens, plans).logits.flatten(0, 1), batch.target.flatten(), reduction="none")
        state = (window - BEGIN).clamp(min=0)
        truth = language.surprise(state[:, :-1], state[:, 1:])
        differences.append((ce.view(truth.shape).double() - truth).mean(1))
    each = torch.cat(differences)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)
