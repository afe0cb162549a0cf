"""Scores as balanced assignment meets them, made up or of a trained run's hidden states.

T tokens, E experts
"""

from pathlib import Path

import torch
from torch import Tensor

from data.batches import Split, TrainingBatches
from data.randomness import generator
from training.checkpoint import LoadedRun, load_run

WORDS, WIDTH = 4000, 64
# zipf N: words of falling frequency, each with a hidden state of its own, and N times as much noise
KINDS = ("gaussian", "common", "zipf 0", "zipf 0.01", "zipf 0.1", "zipf 1", "rank 1", "rank 2", "rank 4", "heavy")
KINDS += ("identical", "half", "wanted")


def drawn(kind: str, tokens: int, experts: int) -> Tensor:
    """(1, T, E) scores of a kind: of hidden states times orthogonal centroids, or plain. Deterministic."""
    draws = generator(kind, tokens, experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    name, _, number = kind.partition(" ")
    if name == "zipf":
        word = torch.multinomial(1 / torch.arange(1.0, WORDS + 1), tokens, replacement=True, generator=draws)
        hidden = normal(WORDS, WIDTH)[word] + float(number) * normal(tokens, WIDTH)
        scores = hidden @ orthogonal(experts, WIDTH, draws).T
    elif name == "rank":
        scores = normal(tokens, int(number)) @ normal(int(number), experts)
    elif name == "common":  # a direction that all rows share
        scores = normal(tokens, experts) + 10 * normal(1, experts)
    elif name == "heavy":
        scores = normal(tokens, experts) / normal(tokens, 1).abs().clamp(min=1e-3)
    elif name == "identical":
        scores = normal(1, experts).expand(tokens, experts).clone()
    else:
        scores = normal(tokens, experts)
        if name == "half":  # half of the rows are one row
            scores[: tokens // 2] = scores[0].clone()
        elif name == "wanted":  # one expert of 32 is all that 1.3 times its share of rows want, by nine deviations
            rows = int(1.3 * tokens / experts)
            for expert in range(max(1, experts // 32)):
                scores[expert * rows : (expert + 1) * rows, expert] += 9
    return scores[None]


def orthogonal(rows: int, width: int, draws: torch.Generator) -> Tensor:
    size = max(rows, width)
    return torch.linalg.qr(torch.randn(size, size, generator=draws))[0][:rows, :width]


def routed_run(folder: Path) -> LoadedRun:
    """Raises ValueError as load_run does, and if the run has no sparse layer."""
    run = load_run(folder)
    if not run.model.sparse:
        raise ValueError(f"{folder} has no sparse layer")
    return run


def of_a_run(run: LoadedRun, tokens: int, experts: int) -> Tensor:
    """(1, T, E): what the run's first sparse layer reads of training text, times orthogonal centroids."""
    model, settings, prepared, *_ = run
    length = settings.data.sequence_length
    group = settings.train.routing_group
    rows = -(-tokens // (length * group)) * group  # whole groups, of which routers take loads and assignments
    batches = TrainingBatches(Split(prepared, "train", length), rows, settings.seed)
    seen: list[Tensor] = []
    ffn = next(iter(model.sparse.values()))
    hook = ffn.router.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        batch, plans = model.prepare(batches.batch(0))
        model(batch.tokens, plans, batch.document, batch.source)
    hook.remove()
    return (seen[0][:tokens].float() @ orthogonal(experts, seen[0].shape[1], generator("centroids")).T)[None]
