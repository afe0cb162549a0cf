"""`python -m analysis.report NAME`: the table and the figure of a sweep, from the folders of its runs."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from analysis import tables
from analysis.explain import explain
from analysis.figures import save_differences, save_learning_curves
from analysis.runs import Mirror, flaws, read_study
from analysis.wandb_runs import mirrors


def report(name: str, runs: Path, results: Path, places: Sequence[Mirror] = ()) -> str:
    """Write table, runs and figure to results/<scale>/<name>/; return what to print. ValueError if no run finished."""
    style = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text())
    study = read_study(name, runs, places)
    frame = tables.table(study, style)
    header, notes = tables.header(study, style), tables.notes(study, frame) + flaws(study)
    parts = (tables.printed, tables.by_text, tables.costs)
    terminal, markdown = ("\n\n".join(filter(None, (p(frame, f) for p in parts))) for f in ("simple", "pipe"))

    folder = results / study.scale / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in {"table.csv": frame, "runs.csv": study.runs}.items():
        rows.to_csv(folder / file, index=False, float_format="%.15g", lineterminator="\n")
    (folder / "table.md").write_text(f"{header}\n\n{markdown}\n\n```text\n{notes}\n```\n")
    many = len(frame) > len(style["arms"]) + len(style["others"])  # more curves than looks
    shows = "differences with their intervals" if many else "learning curves, mean over seeds ± standard deviation"
    (save_differences if many else save_learning_curves)(study, frame, style, folder)

    where = f"table   {folder}/table.md, table.csv\n"
    where += f"figure  {folder}/figure.png, figure.pdf: {shows}\n"
    where += f"runs    {folder}/runs.csv, folders in {runs}/"
    fair = frame.loc[~frame["label"].str.endswith(tables.LEAKS), "arm"]  # an oracle has nothing to continue with
    ranked = study.counted.sort_values("val/ce").sort_values("arm", key=lambda arm: ~arm.isin(fair), kind="stable")
    best = shlex.quote(str(runs / ranked["id"].iloc[0]))
    known = {"python": os.path.relpath(sys.executable), "best": best, "sweep": name}
    ideas = [f"  # {idea['why']}\n  {idea['command'].format(**known)}" for idea in style["next"]]
    return "\n\n".join([header, terminal, notes, where, "\n".join(["what to try next:", *ideas])])


def explained(name: str, runs: Path, results: Path, places: Sequence[Mirror] = ()) -> str:
    """Write explain.md and its figures beside the table; return what to print. ValueError as explain does."""
    style = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text())
    study = read_study(name, runs, places)
    return explain(study, tables.table(study, style), style, runs, results / study.scale / name)


def main() -> None:
    """Print the report, or leave with status 1 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("name", help="a sweep that was run, for example quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where tables and figures go")
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
        offline = given.runs if given.offline is True else given.offline
        places = mirrors(given.name, given.runs, offline, given.wandb)
        print(report(given.name, given.runs, given.results, places))
        if given.explain:
            print(f"\n{explained(given.name, given.runs, given.results, places)}")
    except (ValueError, OSError) as error:
        parser.exit(1, f"analysis.report: {error}\n")


if __name__ == "__main__":
    main()
