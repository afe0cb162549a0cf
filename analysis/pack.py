"""`python -m analysis.pack OUT.tar.xz [--runs RUNS]`: finished runs without weights, to bring home from elsewhere.

What reports read is kept, so that `tar xf OUT.tar.xz` beside run.py gives the same tables there, and the launcher skips
these runs; what --explain reads is not, for it is a hundred times larger: make that report before.
"""

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save

from analysis.metrics import VALIDATION

WHOLE = ("config.yaml", "provenance.json", "result.json")
LARGE = ("token_expert/", "input_")  # of evaluation.safetensors, behind the split's name: a value for each token id
TRAINING_LINES = 50  # of metrics.jsonl that stay, besides all validations


def pack(runs: Path, out: Path) -> tuple[int, int]:
    """Writes the archive; how many runs are in it, and how many were left out as not finished. Raises ValueError for no
    finished run and for another kind of archive, OSError if it is there already."""
    if not out.name.endswith(".tar.xz"):
        raise ValueError(f"the archive's name must end in .tar.xz; got {out}")
    folders = sorted(path for path in runs.glob("*-s*-*") if path.is_dir())
    finished = [folder for folder in folders if (folder / "result.json").exists()]
    if not finished:
        raise ValueError(f"{runs} has no finished run")
    with open(out, "xb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
        for folder in finished:
            for name, content in kept(folder):
                add(archive, f"runs/{folder.name}/{name}", content)
        for record in sorted((runs / "sweeps").glob("*.json")):
            add(archive, f"runs/sweeps/{record.name}", record.read_bytes())
    return len(finished), len(folders) - len(finished)


def kept(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of what stays of a finished run."""
    runs = f"{folder.resolve().parent}/".encode()  # where it stood: what a run names as another's folder
    for name in WHOLE:
        yield name, (folder / name).read_bytes().replace(runs, b"runs/")
    yield "metrics.jsonl", thinned((folder / "metrics.jsonl").read_text()).encode()
    if (folder / "evaluation.safetensors").exists():
        with safe_open(folder / "evaluation.safetensors", "np") as file:
            small = [key for key in file.keys() if not key.partition("/")[2].startswith(LARGE)]  # noqa: SIM118
            about = (file.metadata() or {}) | {"packed": "without " + ", ".join(LARGE)}
            yield "evaluation.safetensors", save({key: file.get_tensor(key) for key in small}, about)


def thinned(text: str) -> str:
    """All validations, the last line, and some fifty of the others at even distances."""
    lines = text.splitlines(keepends=True)
    others = [number for number, line in enumerate(lines) if VALIDATION not in line]
    stay = {others[place * len(others) // TRAINING_LINES] for place in range(TRAINING_LINES)} if others else set()
    return "".join(line for n, line in enumerate(lines) if VALIDATION in line or n in stay or n == len(lines) - 1)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("out", type=Path, help="the archive, which must not exist yet")
    made.add_argument("--runs", type=Path, default=Path("runs"), help="the folder with the run folders")
    args = made.parse_args()
    try:
        packed, left = pack(args.runs, args.out)
    except (ValueError, OSError) as error:
        print(f"analysis.pack: {error}", file=sys.stderr)
        sys.exit(2)
    size = args.out.stat().st_size / 1e6
    print(
        f"{packed} runs in {args.out}, {f'{size:.1f} MB' if size >= 1 else f'{1e3 * size:.0f} kB'}"
        + (f"; {left} unfinished ones left out" if left else "")
    )


if __name__ == "__main__":
    main()
