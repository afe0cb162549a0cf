"""python -m training.sample RUN: continue a text with a finished run."""

import argparse
import sys

import torch

from data.batches import make_batch
from data.randomness import generator
from data.tokenizer import END, decode, encode, load_tokenizer
from training.checkpoint import LoadedRun, load_run


def next_token_scores(run: LoadedRun, ids: list[int]) -> torch.Tensor:
    """(V,) logits of what follows ids, of which the model sees the last window."""
    window = torch.tensor([ids[-run.model.sequence_length :] + [END]])  # the last stands for the unknown target
    document = torch.cumsum(window == END, 1) - (window == END).long()
    group = run.settings.train.routing_group  # routers see whole groups: the rest is padding
    window, document = window.expand(group, -1), document.expand(group, -1)
    real = torch.zeros(group, window.shape[1] - 1, dtype=torch.bool)
    real[0] = True
    batch = make_batch(window, document, real, torch.zeros(group, dtype=torch.int64))
    with torch.no_grad():
        batch, plans = run.model.prepare(batch)
        return run.model(batch.tokens, plans, batch.document).logits[0, -1].float()


def sample(run: LoadedRun, prompt: str, length: int, temperature: float, seed: int) -> str:
    """The prompt continued, by length tokens or to the document's end. At temperature 0 the likeliest."""
    tokenizer = load_tokenizer(run.prepared.folder)
    ids, draws = [END, *encode(tokenizer, prompt)], generator(seed, "sample")
    for _ in range(length):
        scores = next_token_scores(run, ids)
        if temperature > 0:
            ids.append(int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=draws)))
        else:
            ids.append(int(scores.argmax()))
        if ids[-1] == END:
            break
    return decode(tokenizer, [i for i in ids if i != END])


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a run.")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--prompt", default="def ", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=80, help="how many tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        run = load_run(options.run)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(sample(run, options.prompt, options.tokens, options.temperature, options.seed))


if __name__ == "__main__":
    main()
