import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, compose_config
from omegaconf import open_dict

from training.job import FINISHED, run

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The code block under the line that names a file."""
    return re.search(rf"`{name}`:\n\n```\w+\n(.*?)```", README, re.S).group(1)


def test_the_router_that_readme_adds_trains(tiny, tmp_path, monkeypatch):
    source = tmp_path / "modulo.py"
    source.write_text(block("routers/modulo.py"))
    spec = importlib.util.spec_from_file_location("routers.modulo", source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "routers.modulo", module)
    spec.loader.exec_module(module)
    config = compose_config("router=dense", *tiny)
    with open_dict(config):
        config.router, config.arm = yaml.safe_load(block("conf/router/modulo.yaml")), "modulo"
    assert run(config) == FINISHED
    assert len(list((tmp_path / "runs").glob("modulo-s0-*/result.json"))) == 1


def test_every_router_and_every_metric_is_in_readme():
    for path in (ROOT / "conf" / "router").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem
    for metric in ("max_over_mean", "entropy", "dropped", "weight", "unused", "aux_loss", "assignment_gap"):
        assert f"`route/<layer>/{metric}`" in README


def test_the_tree_in_readme_is_true():
    tree = README.split("## Where things are")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()}
    assert all((ROOT / name).exists() for name in named)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= named | {"notebooks", "benchmarks"}


@pytest.mark.parametrize(("part", "table"), [(0, "small/main"), (1, "smoke/quickstart")])
def test_the_tables_in_readme_are_the_committed_ones(part, table):
    committed = (ROOT / "results" / table / "table.md").read_text().split("\n\n")[1].strip()
    shown = [block for block in README.split("## ")[part].split("\n\n") if block.startswith("| method")]
    assert shown == [committed]


def test_a_third_partys_router_is_trained_tabled_and_certified_from_a_folder_of_its_own(tiny, tmp_path):
    """README's commands, at a small size; nothing in this repository changes."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "modulo.py").write_text(block("routers/modulo.py"))
    (tmp_path / "conf" / "router").mkdir(parents=True)
    yaml_text = block("conf/router/modulo.yaml").replace("routers.modulo", "mine.modulo")
    (tmp_path / "conf" / "router" / "modulo.yaml").write_text(yaml_text)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    own = [f"hydra.searchpath=[file://{tmp_path}/conf]", "extra_packages=[mine]"]

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python(str(ROOT / "run.py"), "-m", "sweeps=quickstart", "router=dense,modulo", "seed=0", *tiny, *own)
    assert "modulo" in python("-m", "analysis.report", "quickstart")
    assert "passed" in python("-m", "routers.certify", "router=modulo", "--quick", *own)
    unknown = [sys.executable, str(ROOT / "run.py"), "router=modulo", own[0]]
    refused = subprocess.run(unknown, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "see extra_packages" in refused.stderr

    source = tmp_path / "mine" / "modulo.py"
    source.write_text(source.read_text().replace("tokens.id + self.shift", "7 * tokens.id + self.shift"))
    for words in (["-m", "sweeps=quickstart", "router=dense,modulo", "seed=0"], ["router=modulo"]):
        again = [sys.executable, str(ROOT / "run.py"), *words, *tiny, *own]
        refused = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
        assert "mine/modulo.py has changed since" in refused.stderr
