"""Committed results: every table comes again, to the byte, from the runs.csv beside it."""

import shutil
from pathlib import Path

import pytest

from analysis import trials
from analysis.arms import load
from analysis.report import write_tables

RESULTS = Path(__file__).parents[1] / "results"


MADE_OF = {"runs.csv": write_tables, "ledger.csv": trials.write_table}


@pytest.mark.parametrize(
    "source",
    [path.relative_to(RESULTS) for name in MADE_OF for path in sorted(RESULTS.glob(f"*/*/{name}"))],
    ids=str,
)
def test_committed_tables_come_again_from_what_is_beside_them(source, tmp_path):
    folder = tmp_path / source.parent.name
    folder.mkdir()
    shutil.copy(RESULTS / source, folder)
    MADE_OF[source.name](folder, load("style"))
    for name in ("table.md", "table.tex", "table.csv"):
        assert (folder / name).read_bytes() == (RESULTS / source.parent / name).read_bytes()
