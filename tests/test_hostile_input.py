"""Nothing that is read can run code: no name that unpickles or evaluates stands anywhere in the project's Python."""

import ast
import subprocess

import pytest
from conftest import ROOT

PACKAGES = ("routers", "models", "data", "training", "analysis", "sweeps", "benchmarks")
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
BUILTINS = {"eval", "exec"}
CALLS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "torch.hub.load"}
CALLS |= {"pd.read_pickle", "pandas.read_pickle"}


def forbidden(source: str) -> list[str]:
    """What of the above the source holds, by its syntax tree."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in CALLS or node.attr == "read_pickle"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            wanted = node.arg == "weights_only"
            if not (isinstance(node.value, ast.Constant) and node.value.value is wanted):
                found.append(ast.unparse(node))
    return found


def test_no_file_unpickles_or_evaluates():
    files = [ROOT / "run.py", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    assert {str(path.relative_to(ROOT)): names for path in files if (names := forbidden(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "frame.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "load(path, weights_only=False)",
        *(f"{call}(path)" for call in sorted(CALLS)),
    ],
)
def test_each_of_them_would_be_found(line):
    assert forbidden(line)


def test_packages_begin_empty_and_files_are_called_after_what_they_hold():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in tracked.stdout.split()]
    assert len(files) > 100
    assert not [path for path in files if path.name == "__init__.py" and path.stat().st_size]
    assert not [path for path in files if path.name == "utils.py"]
