"""metrics.jsonl: its lines, what is wrong with them, and the validation curve."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

CURVE = ["step", "tokens", "seconds", "val/ce", "val/tokens"]  # seconds of training; validation tokens that were read
VALIDATION = '"val/ce"'
EVERYWHERE, LAST = ("assignment_gap", "dropped"), ("max_over_mean", "weight")  # of all logged steps, and of the last
FIGURES = {key: re.compile(rf'/{key}": ([-+.\de]+)') for key in EVERYWHERE + LAST}
STEP = re.compile(r'^\{"step": (\d+),.*\}$', re.MULTILINE)


class Metrics(NamedTuple):
    """Lines as written, parsed when they are needed, and sentences on what is wrong with them that moves no figure."""

    written: list[str]
    flaws: list[str]

    def lines(self, wanted: str = "") -> list[dict[str, Any]]:
        """Those that hold the text `wanted`, in order. ValueError if one is damaged."""
        return parsed(f"[{','.join(line for line in self.written if wanted in line)}]", "metrics.jsonl")

    @property
    def last_step(self) -> int:
        """-1 before the first line."""
        return parsed(self.written[-1], "metrics.jsonl")["step"] if self.written else -1

    def progress(self) -> str:
        """How far the run came, for people."""
        return f"at step {self.last_step}" if self.written else "before its first step"

    def curve(self) -> pd.DataFrame:
        """A row a validation, of CURVE. Of a step that was validated twice the later line counts."""
        rows = {line["step"]: [line.get(key) for key in CURVE] for line in self.lines(VALIDATION)}
        return pd.DataFrame([row for _, row in sorted(rows.items())], columns=CURVE)

    def routing(self) -> dict[str, float]:
        """Of all layers and lines the largest certified gap and share of dropped assignments, and in the last line that
        has them the fullest expert over the mean and the least layer's weight, as route/<figure>. What was not logged
        is left out."""
        last = next((line for line in reversed(self.written) if '/max_over_mean": ' in line), "")
        text, found = "\n".join(self.written), {}
        for key, pattern in FIGURES.items():
            everywhere = key in EVERYWHERE and f'/{key}": ' in last  # a router logs the same figures at each step
            logged = pattern.findall(text if everywhere else last)
            if logged:
                found[f"route/{key}"] = (min if key == "weight" else max)(map(float, logged))
        return found


def read_metrics(folder: Path) -> Metrics:
    """A line that a kill cut short is the last one: it is left out. ValueError if another line is no JSON."""
    path = folder / "metrics.jsonl"
    *written, last = path.read_text().split("\n") if path.exists() else [""]
    flaws = ["the last line of metrics.jsonl is cut"] if last else []
    return Metrics(written, flaws + _twice(_steps(written)))


def parsed(text: str, name: str) -> Any:
    """ValueError that says what `name` is damaged by."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _steps(written: list[str]) -> list[tuple[int, bool]]:
    """(step, whether it is a validation) of each line. ValueError that names a damaged one.

    To parse a sweep's lines takes seconds, so a line that begins and ends as the recorder writes it and opens no second
    brace is taken for whole.
    """
    text = "\n".join(written)
    steps = [int(step) for step in STEP.findall(text)]
    if not len(steps) == len(written) == text.count("{"):
        steps = [parsed(line, f"line {number} of metrics.jsonl")["step"] for number, line in enumerate(written, 1)]
    return [(step, VALIDATION in line) for step, line in zip(steps, written)]


def _twice(steps: list[tuple[int, bool]]) -> list[str]:
    """A step has at most one line of training and one of validation."""
    if len(set(steps)) == len(steps):
        return []
    twice = sorted({step for (step, _), times in Counter(steps).items() if times > 1})
    named = ", ".join(map(str, twice[:5])) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
    return [f"metrics.jsonl has step {named} twice; the later line counts"]
