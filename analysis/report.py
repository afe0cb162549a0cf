"""`python -m analysis.report NAME`: the table and the figure of a sweep, from the folders of its runs."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import yaml

from analysis import figures, tables
from analysis.runs import Study, read_study


def report(name: str, runs: Path, results: Path, reference: str | None = None) -> str:
    """Write tables and figure to results/<scale>/<name>/; return what to print. ValueError if none."""
    style = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text())
    study = read_study(name, runs)
    labels = tables.labels(study, style)
    reference = _reference(labels, reference, style)
    frame = tables.table(study, style, reference)
    header = tables.header(study, style)
    notes = "\n".join(tables.notes(study, frame, labels[reference]))
    terminal, markdown = (tables.printed(frame, labels[reference], form) for form in ("simple", "pipe"))
    figure = figures.learning_curves(study, style, labels, reference)

    folder = results / study.scale / study.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"table.csv": frame, "runs.csv": tables.behind(study)}.items():
        rows.to_csv(folder / name, index=False, float_format="%.15g", lineterminator="\n")
    (folder / "table.md").write_text(f"{header}\n\n{markdown}\n\n```text\n{notes}\n```\n")
    figures.save(figure, folder, "figure")
    return "\n\n".join([header, terminal, notes, _where(folder, runs), *_next(study, style, runs)])


def _reference(labels: dict[str, str], wished: str | None, style: dict) -> str:
    """The arm that the others are held against: the one asked for, or style's, or the first."""
    if wished is not None and wished not in labels:
        raise ValueError(f"--reference {wished!r} is no arm of this sweep: {', '.join(labels)}")
    return wished or (style["reference"] if style["reference"] in labels else next(iter(labels)))


def _where(folder: Path, runs: Path) -> str:
    made = {
        "table": "table.md, table.csv",
        "figure": "figure.png, figure.pdf",
        "runs": f"runs.csv, folders in {runs}/",
    }
    return "\n".join(f"{what:7} {folder}/{files}" for what, files in made.items())


def _next(study: Study, style: dict, runs: Path) -> list[str]:
    """Commands worth trying, from style's list for this sweep."""
    best = shlex.quote(str(runs / str(study.counted.set_index("id").loc[:, "val/ce"].idxmin())))
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else "python"
    ideas = style["next"].get(study.name, [])
    lines = [f"  # {idea['why']}\n  " + idea["command"].format(best=best, python=python) for idea in ideas]
    return ["\n".join(["what to try next:", *lines])] if lines else []


def main() -> int:
    """Print the report; 0 if there is one, 1 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("name", help="a sweep that was run, for example quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where tables and figures go")
    parser.add_argument("--reference", help="the arm that the others are held against")
    args = parser.parse_args()
    try:
        print(report(args.name, args.runs, args.results, args.reference))
    except (ValueError, OSError) as error:
        print(f"analysis.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
