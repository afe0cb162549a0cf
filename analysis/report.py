"""`python -m analysis.report NAME`: the table and the figure of a sweep, from the folders of its runs.

`python -m analysis.report results/SCALE/NAME/runs.csv` makes the tables again from that file alone.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import behind, notes, tables
from analysis.arms import declared, described, grouping, load, with_groups
from analysis.figures import save_figure
from analysis.published import published, routing_curves
from analysis.runs import Mirror, read_record, read_study
from analysis.summary import summary, within_groups
from analysis.trials import report_trials, write_table
from analysis.wandb_runs import mirrors


def report(name: str, runs: Path, results: Path, places: Sequence[Mirror] = (), curves: Path | None = None) -> str:
    """Write table, runs and figure to results/<scale>/<name>/; return what to print. ValueError if no run finished, or
    if curves, a file of public curves to lay under the figure, is none."""
    style, asked = load("style"), declared(name)
    if curves and asked["figure"] != "against":
        raise ValueError(f"public curves lie under figures over a number in the labels; that of {name!r} is none")
    if any(cell.get("place") for cell in read_record(name, runs, places).cells):
        return report_trials(runs, results, name, style)
    public = routing_curves(curves) if curves else None
    study = read_study(name, runs, places, grouping(style, asked))
    asked = with_groups(asked, study.runs)
    folder = results / study.scale / name
    folder.mkdir(parents=True, exist_ok=True)
    found = behind.behind(study, runs, results, style, asked)
    behind.write(found, folder / "runs.csv")
    printed, frame = write_tables(folder, style, runs)
    shows = save_figure(study, frame, style, asked, folder, public, found)

    where = f"{tables_at(folder)}\n"
    where += f"figure  {folder}/figure.png, figure.pdf: {shows}\n"
    where += f"runs    {folder}/runs.csv, folders in {runs}/"
    fair = frame.loc[~tables.leaky(frame), "arm"]  # an oracle has nothing to continue with
    ranked = study.counted.sort_values("val/ce").sort_values("arm", key=lambda arm: ~arm.isin(fair), kind="stable")
    best = runs / ranked["id"].iloc[0]
    command = shlex.split(study.command)
    of_scale = ("scale=", "tuned=", "train.steps=")  # which at another scale would be refused, or too few
    words = [word for word in command if "=" in word and not word.startswith(of_scale)]
    python, run = (_as_typed_here(Path(path)) for path in (sys.executable, Path(__file__).parents[1] / "run.py"))
    known = {"python": python, "run": run, "best": shlex.quote(str(best)), "sweep": shlex.join(words)}
    kept = any((best / "checkpoints").glob("*"))
    fit = [idea for idea in style["next"] if kept >= idea.get("weights", False)]
    fit = [idea for idea in fit if idea.get("scale", study.scale) == study.scale]
    ideas = [f"  # {idea['why']}\n  {idea['command'].format(**known)}" for idea in fit]
    return "\n\n".join([printed, where, "\n".join(["what to try next:", *ideas])])


def _as_typed_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def write_tables(folder: Path, style: dict, place: Path | None = None) -> tuple[str, pd.DataFrame]:
    """table.csv, table.md and table.tex from folder/runs.csv alone; what to print, and the table as a frame.

    place: where the runs are, for the commands that are printed; in files it stands as runs.csv has it."""
    runs = behind.read(folder / "runs.csv")
    asked = with_groups(declared(runs["sweep"].iloc[0]), runs)
    frame = summary(runs, style, asked)
    frame.to_csv(folder / "table.csv", index=False, float_format="%.15g", lineterminator="\n")
    papers = published(asked.get("published", []), described(runs["arm"], style), behind.of_published(runs))
    head, lines = notes.header(runs), notes_of(runs, frame, style, asked, papers)
    brief = asked.get("brief", False)
    (folder / "table.md").write_text(f"{head}\n\n{small_tables(frame, papers, 'pipe')}\n\n```text\n{lines}\n```\n")
    (folder / "table.tex").write_text(tables.in_latex(head, small_tables(frame, papers, "latex_booktabs"), lines))
    terminal = small_tables(frame, papers, "simple", brief)
    shown = notes_of(runs, frame, style, asked, papers, brief, place)
    return "\n\n".join([head, terminal, shown]), frame


def tables_at(folder: Path) -> str:
    return f"table   {folder}/table.md, table.tex, table.csv"


def small_tables(frame: pd.DataFrame, papers: list[dict[str, Any]], form: str, brief: bool = False) -> str:
    """The table in several that fit a terminal."""
    parts = [tables.result(frame, form), tables.beside_published(frame, papers, form)]
    parts += [tables.by_text(frame, form), tables.costs(frame, form)]
    parts += [] if brief else [tables.statistics(frame, form)]
    return "\n\n".join(filter(None, parts))


def notes_of(
    runs: pd.DataFrame,
    frame: pd.DataFrame,
    style: dict,
    asked: dict,
    papers: list,
    brief: bool = False,
    place: Path | None = None,
) -> str:
    lines = notes.columns(runs, frame) + within_groups(frame, asked)
    lines += notes.marks(frame, asked, runs["noise_floor"].iloc[0])
    lines += [] if brief else notes.of_statistics(runs, frame, style, asked)
    lines += notes.of_publications(papers) + notes.conditions(runs, frame, asked)
    tuning = runs["tuning"].iloc[0] or "nothing was tuned: there are no trials of sweeps=tune at this scale"
    lines += tuning.split("; ")
    folder = place or (runs["folder"].iloc[0] if "folder" in runs else "runs")
    return "\n".join(notes.folded(lines) + notes.bad_runs(runs, folder))


def explained(name: str, runs: Path, results: Path, places: Sequence[Mirror] = ()) -> str:
    """Write explain.md and its figures beside the table; return what to print. ValueError as explain does."""
    from analysis.explain import explain  # with torch, which takes two seconds and no table needs

    style, asked = load("style"), declared(name)
    study = read_study(name, runs, places, grouping(style, asked))
    return explain(study, style, with_groups(asked, study.runs), runs, results / study.scale / name)


def main() -> None:
    """Print the report, or leave with status 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help="a sweep that was run, for example quickstart; or the runs.csv of a report")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, help="where tables and figures go (default: results)")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="DeepMind's curves.csv.gz, laid under the figure")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read runs from this wandb project too")
    parser.add_argument(
        "--offline",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="read wandb's offline files too: under --runs, or under FOLDER",
    )
    parser.add_argument("--explain", action="store_true", help="why a router wins: loads, settling, token shares")
    given = parser.parse_args()
    try:
        if given.name.endswith(".csv"):
            if Path(given.name).name != "runs.csv":
                raise ValueError(f"{given.name} is no runs.csv of a report: of that alone its tables are made again")
            if given.results:
                raise ValueError(f"--results is of a sweep's name: the tables of {given.name} go beside it")
            folder = Path(given.name).parent
            again = write_table if (folder / "ledger.csv").exists() else write_tables
            print(f"{again(folder, load('style'))[0]}\n\n{tables_at(folder)}")
            return
        offline = given.runs if given.offline is True else given.offline
        places = mirrors(given.name, given.runs, offline, given.wandb)
        results = given.results or Path("results")
        print(report(given.name, given.runs, results, places, given.curves))
        if given.explain:
            print(f"\n{explained(given.name, given.runs, results, places)}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"analysis.report: {error}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
