"""Kill -9 in the middle. As a script, this file is the process that forks the victims: it has no other thread."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def forked(victim, watch=lambda pid: None) -> int:
    """Runs victim() in a fork; watch(pid) may kill it. Returns the signal that killed it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            victim()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
    watch(pid)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the victim failed before it was killed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def tensors(step: int) -> dict:
    import torch

    return {"model": {"w": torch.full((200_000,), float(step))}, "optimizer": {"m": torch.full((1000,), float(step))}}


def verdict(folder: Path) -> int:
    """The step of the newest usable checkpoint, whose content must be of that step. Raises if there is none."""
    from safetensors.torch import load_file

    from training.checkpoint import latest

    last = latest(folder, warn=lambda _: None)
    if last is None:
        return 0
    step = json.loads((last / "state.json").read_text())["step"]
    assert step == int(last.name)
    assert all(bool((load_file(last / f"{name}.safetensors")[key] == step).all()) for name, key in FILES)
    return step


FILES = (("model", "w"), ("optimizer", "m"))


def killed_at(point: int) -> None:
    """From here on the point-th line of training/checkpoint.py or folder.py, or the point-th change of the file system,
    is this process's last."""
    left = [point]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("training/checkpoint.py", "training/folder.py")):
            return None
        if event == "line":
            count()
        return trace

    changes = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    sys.addaudithook(lambda event, _: count() if event in changes else None)
    sys.settrace(trace)


def at_every_point(folder: Path, every: int) -> dict:
    """Step 2 is saved over step 1 and killed at each point in turn, until one comes that the save does not reach."""
    from training.checkpoint import save

    steps = []
    for point in range(0, 100_000, every):
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, tensors(1), {})

        def victim(point=point):
            killed_at(point)
            save(folder, 2, tensors(2), {})

        if not forked(victim):
            return {"points": point, "steps": steps, "whole": verdict(folder)}
        steps.append(verdict(folder))
        save(folder, 3, tensors(3), {})  # whatever the kill has left is no hindrance
        assert verdict(folder) == 3 and [path.name for path in folder.iterdir()] == ["00000003"]
    raise AssertionError("a save has no end")


def at_random_moments(folder: Path, moments: int) -> dict:
    """A process saves one step after another, and says after each that it is done; killed after some milliseconds."""
    from training.checkpoint import save

    draws, steps = random.Random(0), []
    for _ in range(moments):
        shutil.rmtree(folder, ignore_errors=True)
        read, write = os.pipe()

        def victim(write=write):
            for step in range(1, 100):
                save(folder, step, tensors(step), {})
                os.write(write, bytes([step]))

        def watch(pid, read=read):
            os.read(read, 1)  # the first is there
            time.sleep(draws.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)

        assert forked(victim, watch) == signal.SIGKILL
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = [1, *pipe.read()][-1]
        steps.append((said, verdict(folder)))
    return {"steps": steps}


def runs_at_random_moments(words: Path, moments: int) -> dict:
    """A whole run is killed so many times at random moments and started again each time, then goes on to its end."""
    import torch
    from omegaconf import OmegaConf

    from training.job import run

    torch.set_num_threads(1)
    config, draws, kills = OmegaConf.create(json.loads(words.read_text())), random.Random(0), 0

    def watch(pid):
        time.sleep(draws.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)

    for _ in range(moments):
        kills += forked(lambda: run(config), watch) != 0
    forked(lambda: run(config))
    return {"kills": kills}


def as_script(what: str, *words) -> dict:
    command = [sys.executable, __file__, what, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_point_of_a_save_leaves_a_usable_checkpoint(every, tmp_path):
    found = as_script("at_every_point", tmp_path / "checkpoints", every)
    assert found["points"] > 60 and found["whole"] == 2
    assert set(found["steps"]) == {1, 2}
    assert found["steps"] == sorted(found["steps"])  # once the new one counts, the old one never does again


@pytest.mark.parametrize("moments", [10, pytest.param(200, marks=pytest.mark.long)])
def test_a_kill_at_a_random_moment_leaves_the_checkpoint_that_was_finished_last(moments, tmp_path):
    steps = as_script("at_random_moments", tmp_path / "checkpoints", moments)["steps"]
    assert len(steps) == moments
    assert all(found in (said, said + 1) for said, found in steps), (
        steps
    )  # the next may have been renamed, but not said


@pytest.mark.parametrize("moments", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_equals_one_that_was_not(moments, tiny, tmp_path):
    from conftest import compose_config
    from omegaconf import OmegaConf
    from test_training import final_state, folder_of, lines_of

    words = [*tiny, "router=switch", "record.keep_optimizer=true", "record.checkpoint_every=1"]
    folders = []
    for name, kills in (("whole", 0), ("killed", moments)):
        here = [*words, f"runs={tmp_path}/{name}"]
        settings = tmp_path / f"{name}.json"
        settings.write_text(json.dumps(OmegaConf.to_container(compose_config(*here), resolve=True)))
        folders.append(folder_of(*here))  # and the data is prepared
        assert as_script("runs_at_random_moments", settings, kills)["kills"] <= kills
    whole, killed = map(final_state, folders)
    assert lines_of(folders[0]) == lines_of(folders[1])
    assert whole.keys() == killed.keys() and all(bool((whole[key] == killed[key]).all()) for key in whole)


if __name__ == "__main__":
    what, folder, number = sys.argv[1:]
    print(json.dumps(globals()[what](Path(folder), int(number))))
