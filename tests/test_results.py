"""Committed results: every table comes again, to the byte, from the runs.csv beside it."""

import shutil
from pathlib import Path

import pytest

from analysis import trials
from analysis.arms import load
from analysis.report import write_tables

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize(
    "folder", [path.parent.relative_to(RESULTS) for path in sorted(RESULTS.glob("*/*/runs.csv"))], ids=str
)
def test_committed_tables_come_again_from_their_runs(folder, tmp_path):
    shutil.copy(RESULTS / folder / "runs.csv", tmp_path)
    write_tables(tmp_path, load("style"))
    for name in ("table.md", "table.tex", "table.csv"):
        assert (tmp_path / name).read_bytes() == (RESULTS / folder / name).read_bytes()


@pytest.mark.parametrize("ledger", sorted(RESULTS.glob("*/*/ledger.csv")), ids=lambda path: str(path.parent.name))
def test_committed_tables_of_trials_come_again_from_their_ledger(ledger, tmp_path):
    again = tmp_path / ledger.parent.name
    again.mkdir()
    shutil.copy(ledger, again)
    trials.write_table(again, load("style"))
    for name in ("table.md", "table.tex", "table.csv"):
        assert (again / name).read_bytes() == (ledger.parent / name).read_bytes()
