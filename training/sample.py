"""python -m training.sample RUN: continue a text with a finished run."""

import argparse
import glob
import sys

import torch

from data.batches import make_batch
from data.randomness import generator
from data.source import divided
from data.tokenizer import END, decode, encode, load_tokenizer
from training.arguments import number
from training.checkpoint import LoadedRun, load_run


def next_token_scores(run: LoadedRun, ids: list[int], given: int) -> torch.Tensor:
    """(V,) logits of what follows ids, of which the model sees the last window. given: how many are the prompt's.

    Of dialogues an encoder reads the prompt; of plain text the first tokens, in a short text all but the last.
    """
    seen = ids[-run.model.sequence_length :]
    window = torch.tensor([[*seen, END]])  # the last stands for the unknown target
    document = torch.cumsum(window == END, 1) - (window == END).long()
    group = run.settings.train.routing_group  # routers see whole groups: the rest is padding
    window, document = window.expand(group, -1), document.expand(group, -1)
    real = torch.zeros(group, window.shape[1] - 1, dtype=torch.bool)
    real[0] = True
    counted = torch.arange(len(seen)) >= given - 1 - (len(ids) - len(seen))
    batch = make_batch(window, document, real, torch.zeros(group, dtype=torch.int64), counted.expand(group, -1))
    read = run.model.source_length
    if run.model.encoder is not None and read is not None:
        batch = divided(batch, min(read, len(seen) - 1))
    with torch.no_grad():
        batch, plans = run.model.prepare(batch)
        return run.model(batch.tokens, plans, batch.document, batch.source).logits[0, -1].float()


def sample(run: LoadedRun, prompt: str, length: int, temperature: float, seed: int) -> str:
    """The prompt continued, by length tokens or to the document's end. At temperature 0 the likeliest."""
    tokenizer = load_tokenizer(run.prepared.folder)
    ids, draws = [END, *encode(tokenizer, prompt)], generator(seed, "sample")
    if len(ids) < 2 and run.model.encoder is not None:
        raise ValueError("--prompt must not be empty: an encoder reads it")
    given = len(ids)
    for _ in range(length):
        scores = next_token_scores(run, ids, given)
        if temperature > 0:
            ids.append(int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=draws)))
        else:
            ids.append(int(scores.argmax()))
        if ids[-1] == END:
            break
    return decode(tokenizer, [i for i in ids if i != END])


def one_folder(pattern: str) -> str:
    """The folder, or the one that a glob fits. ValueError if it fits none or several."""
    found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    if len(found) != 1:
        raise ValueError(f"{pattern} must fit one run folder; it fits {', '.join(found) or 'none'}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a run.", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or a glob that fits one")
    parser.add_argument("--prompt", default="def ", help="the text to continue")
    parser.add_argument("--tokens", type=number(int, 0), default=80, help="how many tokens at most")
    parser.add_argument("--temperature", type=number(float, 0), default=0.8, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        run = load_run(one_folder(options.run))
        print(sample(run, options.prompt, options.tokens, options.temperature, options.seed))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
