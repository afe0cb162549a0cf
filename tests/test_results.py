"""Committed results: every table comes again, to the byte, from the runs.csv beside it."""

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
