"""A run as settings and data, with the folder that belongs to it."""

from pathlib import Path
from typing import NamedTuple

from data.batches import Split
from data.mixed_batches import MixedSplit
from data.prepare import Prepared
from training.settings import Settings


class Run(NamedTuple):
    settings: Settings
    prepared: Prepared
    splits: dict[str, Split | MixedSplit]
    folder: Path
