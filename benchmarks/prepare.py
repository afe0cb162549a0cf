"""How fast text becomes tokens: python -m benchmarks.prepare [--files 'books/*.txt'] [OVERRIDES]

MB of text a second, dictionary included, into a cache that is thrown away, median and quartiles of --rounds; without
--files it is made-up text of --megabytes in which words have falling frequencies. Then the time of a batch of what was
prepared, the median of 50. Overrides are run.py's.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.timing import (
    Row,
    command,
    device_of,
    in_milliseconds,
    in_turn,
    measured,
    names,
    parser,
    report,
    with_overrides,
)
from data.mixed_batches import open_split, training_batches
from data.prepare import Prepared
from data.randomness import generator
from training.arguments import number
from training.build import open_data
from training.compose import composed
from training.preflight import read
from training.settings import Settings

WORDS, LETTERS = 20000, "etaoinshrdlucmfw"


def main(words: list[str] | None = None) -> None:
    args = options(words)
    seconds: dict[str, list[float]] = {kind: [] for kind in args.dictionaries}
    prepared = {}
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or made_up(Path(folder) / "text", args.megabytes)
        for number, kind in enumerate(in_turn(args.dictionaries, args.rounds)):
            settings = settings_of(kind, files, Path(folder) / str(number), args.overrides)
            began = time.perf_counter()
            prepared[kind] = (settings, open_data(settings))
            seconds[kind].append(time.perf_counter() - began)
        rows = [row_of(kind, seconds[kind], *prepared[kind]) for kind in args.dictionaries]
    report("prepare", rows, args, device_of("cpu"))


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__)
    made.set_defaults(rounds=3)
    made.add_argument("--files", help="text files, a glob")
    made.add_argument("--megabytes", type=number(float, 0.1), default=20, help="of made-up text")
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
    for n in range(number_of_files):
        picked = torch.multinomial(1 / torch.arange(1.0, WORDS + 1), size, replacement=True, generator=draws)
        lines = [" ".join(words[i] for i in part.tolist()) for part in picked.split(200)]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    return f"{folder}/*.txt"


def settings_of(kind: str, files: str, cache: Path, overrides: list[str]) -> Settings:
    shares = ["data.corpus.validation_share=0.1", "data.corpus.test_share=0.1"]
    words = ["data=text", f"data.corpus.files='{files}'", f"data.cache={cache}", f"tokenizer={kind}", *shares]
    return read(composed([*words, "wandb.mode=disabled", *overrides]))


def row_of(kind: str, seconds: list[float], settings: Settings, prepared: Prepared) -> Row:
    megabytes = sum(split["bytes"] for split in prepared.splits.values()) / 1e6
    split = open_split(prepared, "train", settings.data.sequence_length, settings.data.packing)
    batches = training_batches(split, settings.train.batch_size, settings.seed)
    each = [measured(lambda step=step: batches.batch(step), device_of("cpu")) for step in range(50)]
    rate = in_milliseconds(seconds)
    row = {"dictionary": kind, "entries": prepared.vocab_size, "MB": megabytes, "MB/s": 1e3 * megabytes / rate["ms"]}
    row |= {"low": 1e3 * megabytes / rate["high"], "high": 1e3 * megabytes / rate["low"]}
    return row | {"ms a batch": in_milliseconds(each)["ms"]}


if __name__ == "__main__":
    command(main)
