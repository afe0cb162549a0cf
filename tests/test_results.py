"""Committed results: every table comes again, to the byte, from the runs.csv beside it."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from analysis import trials
from analysis.arms import load
from analysis.behind import read
from analysis.report import write_tables

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("folder", sorted(path.parent.relative_to(RESULTS) for path in RESULTS.glob("*/*/runs.csv")))
def test_committed_tables_come_again_from_what_is_beside_them(folder, tmp_path):
    again, committed = tmp_path / folder.name, RESULTS / folder
    again.mkdir()
    for source in {"runs.csv", "ledger.csv"} & {path.name for path in committed.iterdir()}:
        shutil.copy(committed / source, again)
    (trials.write_table if (again / "ledger.csv").exists() else write_tables)(again, load("style"))
    for name in ("table.md", "table.tex", "table.csv"):
        assert (again / name).read_bytes() == (committed / name).read_bytes()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*/ledger.csv")), ids=lambda path: path.parent.parent.name)
def test_a_committed_ledger_has_the_losses_of_its_runs(path):
    """And all of them: whether a trial counts, its loss to the digits that are written."""
    runs = read(path.with_name("runs.csv"))
    with path.open(newline="") as file:
        rows = {row["run"]: (row["outcome"], row["val_ce"]) for row in csv.DictReader(file)}
    losses = [f"{loss:.6f}" if kind == "finished" else "" for kind, loss in zip(runs["outcome"], runs["val/ce"])]
    assert rows == dict(zip(runs["id"], zip(runs["outcome"], losses)))


@pytest.mark.parametrize("scale", sorted({path.parent.name for path in RESULTS.glob("*/runs-*.tar.xz")}))
def test_packed_runs_have_the_losses_of_the_tables(scale):
    """Of every counted run of the tables; the packs may hold runs of tables that are not published yet."""
    packed = {}
    for path in RESULTS.glob(f"{scale}/runs-*.tar.xz"):
        with tarfile.open(path) as archive:
            for entry in archive:
                if entry.name.endswith("/result.json"):
                    packed[Path(entry.name).parent.name] = json.load(archive.extractfile(entry))["test/ce"]
    for path in RESULTS.glob(f"{scale}/*/runs.csv"):
        runs = read(path)
        counted = runs.loc[runs["outcome"] == "finished"]
        assert {run: packed.get(run) for run in counted["id"]} == dict(zip(counted["id"], counted["test/ce"]))
