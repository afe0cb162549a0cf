"""`python -m analysis.report NAME`: the table and the figure of a sweep, from the folders of its runs."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import yaml

from analysis import tables
from analysis.figures import save_differences, save_learning_curves
from analysis.runs import read_study


def report(name: str, runs: Path, results: Path) -> str:
    """Write table, runs and figure to results/<scale>/<name>/; return what to print. ValueError if no run finished."""
    style = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text())
    study = read_study(name, runs)
    frame = tables.table(study, style)
    header, notes = tables.header(study, style), tables.notes(study, frame)
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
    command = shlex.split(study.command)
    words = [word for word in command[command.index("-m") + 1 :] if not word.startswith("scale=")]
    known = {"python": os.path.relpath(sys.executable), "best": best, "sweep": shlex.join(words)}
    ideas = [f"  # {idea['why']}\n  {idea['command'].format(**known)}" for idea in style["next"]]
    return "\n\n".join([header, terminal, notes, where, "\n".join(["what to try next:", *ideas])])


def main() -> None:
    """Print the report, or leave with status 1 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("name", help="a sweep that was run, for example quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where tables and figures go")
    try:
        print(report(**vars(parser.parse_args())))
    except (ValueError, OSError) as error:
        parser.exit(1, f"analysis.report: {error}\n")


if __name__ == "__main__":
    main()
