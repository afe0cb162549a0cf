"""Evaluation: cross-entropy over a whole split, without randomness or change of state, and where it comes from.

B batch, S sequence, E experts, V vocabulary
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.batches import Batch, Split, evaluation_batches
from data.mixed_batches import MixedSplit
from models.transformer import Transformer
from routers.routing import Plan, Routing, at_least_float32, count

UNIT = 2.0**-28  # nats: losses are added up in whole numbers of it, which come to the same in any order
MOST = 2.0**34  # nats of an evaluation: more do not fit into 64 bits
Losses = tuple[Tensor, dict[int, Routing], Tensor]
Compute = Callable[..., Losses]  # token_losses as build.make_losses gives it: (batch, plans) -> Losses


def token_losses(model: Transformer, batch: Batch, plans: dict[int, Plan]) -> Losses:
    """Cross-entropy (B, S) in nats, 0 where the target does not count; the routings; the summed auxiliary loss."""
    output = model(batch.tokens, plans, batch.document, batch.source)
    ce = cross_entropy(at_least_float32(output.logits).flatten(0, 1), batch.target.flatten(), reduction="none")
    return ce.view(batch.target.shape) * batch.counted, output.routings, output.aux_loss


def frequency_deciles(token_counts: Tensor) -> Tensor:
    """(V,) int64 in 0..9: tokens in falling training frequency, cut into tenths of the training text."""
    counts = token_counts.double()
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    deciles = torch.empty_like(order)
    deciles[order] = (10 * before / counts.sum().clamp(min=1)).long().clamp(max=9)
    return deciles


@contextmanager
def evaluating(model: Transformer, as_in_training: bool, training_graph: bool = False) -> Iterator[None]:
    """Evaluation mode, without gradients; as_in_training leaves the routers in training mode, training_graph all, with
    gradients."""
    model.train(training_graph)
    for router in model.routers.values():
        router.train(as_in_training or training_graph)
    try:
        with torch.set_grad_enabled(training_graph):
            yield
    finally:
        model.train()


def evaluate(
    model: Transformer,
    losses: Compute,
    split: Split | MixedSplit,
    batch_size: int,
    counts: Tensor,
    as_in_training: bool = False,
    windows: int | None = None,
    watch: Callable[[float], None] = lambda share: None,
    training_graph: bool = False,
) -> dict[str, Tensor]:
    """Sums over the split, in float64 and int64 on the CPU. counts (V,): of each token in training.

    windows: over so many of the split alone, at even distances; None: over all. watch is told before each batch which
    share is done. training_graph: losses are compiled, and nothing but routers does otherwise in training; where these
    choose as in training, run as training does, for the graph of evaluation mode would be another one, which takes a
    second to load, or ten to compile.

    ce_sum, tokens (); document_ce_sum, document_tokens (documents,) by the target's document; decile_ce_sum and
    decile_tokens (10,) by the target's training frequency, the most frequent first; input_ce_sum, input_tokens (V,) by
    the token that the target follows; for each sparse layer load/<layer> (E,) and token_expert/<layer> (V, E), how
    often each token id went to each expert. ce_sum is not a number where a loss was not, or all exceed MOST.
    """
    device, width = model.embedding.device, model.num_experts
    sizes = {"document": len(split.ends) + 1, "decile": 10, "input": len(counts)}
    sums = {name: torch.zeros(2, size, dtype=torch.int64, device=device) for name, size in sizes.items()}
    experts = {layer: torch.zeros(len(counts) * width, dtype=torch.int64, device=device) for layer in model.routers}
    deciles, total = frequency_deciles(counts).to(device), torch.zeros((), dtype=torch.float64, device=device)
    differ = not as_in_training and any(router.trains_differently for router in model.routers.values())
    with evaluating(model, as_in_training, training_graph and not differ):
        of = -(-(min(windows, len(split)) if windows else len(split)) // batch_size)
        for number, batch in enumerate(evaluation_batches(split, batch_size, windows)):
            watch(number / of)
            moved, plans = model.prepare(batch.to(device))
            ce, choices = chosen(losses(moved, plans))
            nats = torch.where(moved.counted, ce.double(), 0.0)
            total += nats.sum()
            added = torch.stack([(nats / UNIT).round().long(), moved.counted.long()]).flatten(1)
            places = {"document": moved.target_document, "decile": deciles[moved.target], "input": moved.tokens.id}
            for name, place in places.items():
                for row, each in zip(sums[name], added, strict=True):
                    row.scatter_add_(0, place.flatten(), each)
            for layer, (place, expert, served) in choices.items():
                token = moved.routed(model.in_encoder).id.reshape(-1).index_select(0, place)
                experts[layer] += count(token * width + expert, len(experts[layer]), served)
    result = {}
    for name, (nats, tokens) in sums.items():  # the host waits for the device here alone
        result |= {f"{name}_ce_sum": nats.cpu().double() * UNIT, f"{name}_tokens": tokens.cpu()}
    for layer, counted in experts.items():
        result[f"token_expert/{layer}"] = counted.view(len(counts), width).cpu()
        result[f"load/{layer}"] = result[f"token_expert/{layer}"].sum(0)
    whole = result["document_ce_sum"].sum() if total < MOST else torch.tensor(math.nan, dtype=torch.float64)
    return result | {"ce_sum": whole, "tokens": result["document_tokens"].sum()}


def chosen(losses: Losses) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """Cross-entropy (B, S); by layer of each assignment its token, its expert, and whether it was served (1 or 0). None
    of it holds on to what a backward pass would need."""
    ce, routings, _ = losses
    return ce.detach(), {layer: (r.token, r.expert, (r.weight > 0).long()) for layer, r in routings.items()}


def mean_ce(sums: dict[str, Tensor]) -> float:
    """Nats per token."""
    return float(sums["ce_sum"] / sums["tokens"])


def text_figures(ce: float, tokens: int, text: dict[str, Any]) -> dict[str, float | None]:
    """What dictionaries can be compared by. ce: nats per token over so many; text: the split's figures, as in Prepared.

    word_perplexity: exp(nats of the counted tokens, ends included, over the words that whitespace parts), None where it
    is no number; bits_per_byte: of UTF-8; unknown_share: of tokens that are the unknown word, whose text is not priced;
    priced_share: of the counted tokens those that are targets, whose mean stands for the others: not the first of all,
    nor of packed documents the first of each, nor of plain text what an encoder reads.
    """
    nats = ce * text["counted"]
    per_word = nats / text["words"] if text["words"] else math.inf
    return {
        "word_perplexity": math.exp(per_word) if per_word < 700 else None,
        "bits_per_byte": nats / math.log(2) / text["bytes"],
        "unknown_share": text["unknown"] / text["counted"],
        "priced_share": tokens / text["counted"],
    }
