"""The notebooks, as committed, on small runs that run.py's code made."""

import importlib.util
import json
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, small_study, monkeypatch, capsys):
    """Its cells in order, as plain Python: a machine with the test extra alone has no Jupyter."""
    monkeypatch.chdir(ROOT / "notebooks")
    matplotlib.use("agg")
    known: dict = {}
    for cell in cells(path):
        exec(compile("".join(cell["source"]), path.name, "exec"), known)
        if "parameters" in cell["metadata"].get("tags", []):
            known["runs"] = small_study
    known["plt"].close("all")
    assert {"01": "of 6 runs are counted", "02": "C12  not run", "03": "by chance"}[
        path.stem[:2]
    ] in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="the extra `notebooks` is not installed")
@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupyter_runs_a_notebook(path, small_study):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\nruns = Path({str(small_study)!r})"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()


def test_there_are_the_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_first_look", "02_paper_tables", "03_inside_a_router"]
