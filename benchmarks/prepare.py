"""How fast text becomes tokens: python -m benchmarks.prepare [--files 'books/*.txt'] [OVERRIDES]

MB of text a second, dictionary included, into a cache that is thrown away; without --files it is made-up text of
--megabytes in which words have falling frequencies. Then batches a second of what was prepared. Overrides are run.py's.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.timing import Row, command, device_of, names, parser, report, with_overrides
from data.mixed_batches import open_split, training_batches
from data.randomness import generator
from training.build import open_data
from training.compose import composed
from training.preflight import read

WORDS, LETTERS = 20000, "etaoinshrdlucmfw"


def main(words: list[str] | None = None) -> None:
    args = options(words)
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or made_up(Path(folder) / "text", args.megabytes)
        rows = [one_dictionary(kind, files, Path(folder) / kind, args.overrides) for kind in args.dictionaries]
    report("prepare", rows, args, device_of("cpu"))


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__, rounds=False)
    made.add_argument("--files", help="text files, a glob")
    made.add_argument("--megabytes", type=float, default=20)
    made.add_argument("--dictionaries", type=names, default=("bpe", "words", "bytes"))
    return with_overrides(made, words)


def made_up(folder: Path, megabytes: float) -> str:
    """Forty files or more, of a quarter megabyte at most; their glob."""
    folder.mkdir()
    draws = generator("prepare")
    lengths = torch.randint(2, 10, (WORDS,), generator=draws).tolist()
    letters = torch.randint(len(LETTERS), (WORDS, 10), generator=draws).tolist()
    words = ["".join(LETTERS[c] for c in row[:length]) for row, length in zip(letters, lengths)]
    number_of_files = max(40, round(4 * megabytes))
    size = round(1e6 * megabytes / number_of_files / 5)  # words of some five bytes
    for number in range(number_of_files):
        picked = torch.multinomial(1 / torch.arange(1.0, WORDS + 1), size, replacement=True, generator=draws)
        lines = [" ".join(words[i] for i in part.tolist()) for part in picked.split(200)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return f"{folder}/*.txt"


def one_dictionary(kind: str, files: str, cache: Path, overrides: list[str]) -> Row:
    shares = ["data.corpus.validation_share=0.1", "data.corpus.test_share=0.1"]
    words = ["data=text", f"data.corpus.files='{files}'", f"data.cache={cache}", f"tokenizer={kind}", *shares]
    settings = read(composed([*words, "wandb.mode=disabled", *overrides]))
    began = time.perf_counter()
    prepared = open_data(settings)
    seconds = time.perf_counter() - began
    megabytes = sum(split["bytes"] for split in prepared.splits.values()) / 1e6
    split = open_split(prepared, "train", settings.data.sequence_length, settings.data.packing)
    batches, number = training_batches(split, settings.train.batch_size, settings.seed), 50
    began = time.perf_counter()
    for step in range(number):
        batches.batch(step)
    each = (time.perf_counter() - began) / number
    row = {"dictionary": kind, "entries": prepared.vocab_size, "MB": megabytes, "s": seconds}
    return row | {"MB/s": megabytes / seconds, "ms a batch": 1e3 * each}


if __name__ == "__main__":
    command(main)
