"""`python -m analysis.report NAME`: the table and the figure of a sweep, from the folders of its runs."""

import argparse
import os
import sys
from pathlib import Path

import yaml

from analysis import figures, tables
from analysis.runs import Study, read_study


def report(name: str, runs: Path, results: Path, reference: str | None = None) -> str:
    """Write table.md, table.csv, runs.csv, figure.png and figure.pdf to results/<scale>/<name>/; return what to print."""
    style = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text())
    study = read_study(name, runs)
    labels = tables.labels(study, style)
    reference = _reference(labels, reference, style)
    frame = tables.table(study, style, reference)
    header, notes = tables.header(study, style), tables.notes(study, frame, labels[reference])
    folder = results / study.scale / study.name
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "table.csv", index=False, lineterminator="\n")
    tables.behind(study).to_csv(folder / "runs.csv", index=False, lineterminator="\n")
    markdown = tables.printed(frame, labels[reference], "pipe")
    listed = "\n".join(
        f"- {note.strip()}" if not note.startswith("  ") else f"  - {note.strip()}" for note in notes
    )
    (folder / "table.md").write_text(f"{header}\n\n{markdown}\n\n{listed}\n")
    figures.save(figures.learning_curves(study, style, labels, reference), folder, "figure")
    parts = [
        header,
        tables.printed(frame, labels[reference], "simple"),
        "\n".join(notes),
        _where(folder, runs),
        _next(study, style),
    ]
    return "\n\n".join(part for part in parts if part)


def _reference(labels: dict[str, str], wished: str | None, style: dict) -> str:
    """The arm that the others are held against: the one asked for, or style's, or the first."""
    if wished is not None and wished not in labels:
        raise ValueError(f"--reference {wished!r} is no arm of this sweep: {', '.join(labels)}")
    return wished or (style["reference"] if style["reference"] in labels else next(iter(labels)))


def _where(folder: Path, runs: Path) -> str:
    return "\n".join(
        [
            f"table   {folder}/table.md, table.csv",
            f"figure  {folder}/figure.png, figure.pdf",
            f"runs    {runs}/ (those behind the table: {folder}/runs.csv)",
        ]
    )


def _next(study: Study, style: dict) -> str:
    """Commands worth trying, from style's list for this sweep."""
    best = study.counted.loc[study.counted["val/ce"].idxmin(), "folder"]
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else "python"
    tries = [
        (each["command"].format(best=best, python=python), each["why"])
        for each in style["next"].get(study.name, [])
    ]
    return "\n".join(
        ["what to try next:" if tries else ""] + [f"  {command}\n      {why}" for command, why in tries]
    ).strip()


def main() -> int:
    """Print the report; 0 if there is one, 1 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("name", help="a sweep that was run, for example quickstart")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of run folders (default: runs)"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where tables and figures go (default: results)"
    )
    parser.add_argument(
        "--reference", help="the arm that the others are held against (default: style.yaml's)"
    )
    args = parser.parse_args()
    try:
        print(report(args.name, args.runs, args.results, args.reference))
    except (ValueError, OSError) as error:
        print(f"analysis.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
