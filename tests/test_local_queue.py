"""The queue, with real processes. As a script, with FOLDER SLOTS BEHAVIOUR..., this file is the launcher."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sweeps.job import Job, duration
from sweeps.job_queue import Queue
from training import threads
from training.folder import Busy, held

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_BY = os.getpid()
BAD = {
    "raise": "failed with exit status 1",
    "exit": "failed with exit status 3",
    "os_exit": "failed with exit status 4",
    "kill": "killed by SIGKILL",
    "segfault": "killed by SIGSEGV",
    "interrupted": "interrupted",
    "diverge": "diverged at step 7",
}


def behave(cfg: DictConfig) -> int:
    """Stands in for training.job.run: notes its circumstances, then does what the config says."""
    folder = Path(cfg.folder)
    environment = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    facts = {"pid": os.getpid(), "began": time.time(), "forked_from_importer": os.getppid() == IMPORTED_BY}
    print("this is", cfg.behaviour)
    (folder / "facts.json").write_text(json.dumps(facts | environment))
    match cfg.behaviour:
        case "raise":
            (folder / "error.txt").write_text("Traceback ...\nRuntimeError: boom\n")
            raise RuntimeError("boom")
        case "exit":
            sys.exit(3)
        case "os_exit":
            os._exit(4)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "interrupted":
            return 75
        case "diverge":
            (folder / "result.json").write_text('{"outcome": "diverged", "step": 7}')
            return 1
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "save":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            time.sleep(600)
        case "busy_at_first":
            if not (folder / "tried").exists():
                (folder / "tried").touch()
                raise Busy("another process is working on it")
        case "orphan":
            subprocess.Popen(["sleep", "600"])
    time.sleep(0.2)
    (folder / "result.json").write_text('{"outcome": "finished", "val/ce": 5.307, "tokens_per_second": 31400.0}')
    (folder / "facts.json").write_text(json.dumps(facts | environment | {"ended": time.time()}))
    return 0


def make_jobs(folder: Path, behaviours: list[str]) -> list[Job]:
    """Jobs in folders 0-ok, 1-raise, ...; those that have a result are finished."""
    paths = [folder / f"{index}-{behaviour}" for index, behaviour in enumerate(behaviours)]
    return [
        Job(
            path,
            DictConfig({"folder": str(path), "behaviour": behaviour}),
            0 if (path / "result.json").exists() else None,
        )
        for path, behaviour in zip(paths, behaviours)
    ]


def command(folder: Path, slots: int, *behaviours: str) -> list[str]:
    return [sys.executable, __file__, str(folder), str(slots), *behaviours]


def call(folder: Path, slots: int, *behaviours: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command(folder, slots, *behaviours),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )


def facts(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/facts.json"))]


def alive(marker: str) -> list[int]:
    """Processes that have inherited the marker in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # gone in between, or not ours
            continue
    return found


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("first", [0, 3])
def test_a_job_that_fails_harms_no_other_in_any_position(tmp_path, first):
    bad = [*BAD][first:] + [*BAD][:first]
    behaviours = ["ok", *bad, "ok"] if first else [*bad, "ok", "ok"]
    done = call(tmp_path, 2, *behaviours)
    assert done.returncode == 1 and done.stderr == ""
    for index, behaviour in enumerate(behaviours):
        outcome = BAD.get(behaviour, "finished")
        assert f"{index}-{behaviour} {outcome}" in done.stdout
    assert "2 of 9 jobs are finished" in done.stdout
    for index, behaviour in enumerate(behaviours):
        if behaviour in BAD:
            assert f"{index}-{behaviour} {BAD[behaviour]}" in done.stdout.split("2 of 9 jobs")[1]
            assert str(tmp_path / f"{index}-{behaviour}" / "console.log") in done.stdout
    assert "RuntimeError: boom" in done.stdout
    assert "validation ce 5.31, 31.4k tokens/s" in done.stdout


def test_finished_jobs_are_skipped_and_the_others_made(tmp_path):
    assert call(tmp_path, 1, "ok", "exit").returncode == 1
    before = facts(tmp_path)
    again = call(tmp_path, 1, "ok", "exit", "ok")
    assert "1 of 3 jobs are finished already: skipped" in again.stdout and "0-ok" not in again.stdout
    assert facts(tmp_path)[0] == before[0] and facts(tmp_path)[1] != before[1]
    assert (tmp_path / "1-exit" / "console.log").read_text() == "this is exit\n" * 2
    only = call(tmp_path, 1, "ok")
    assert only.returncode == 0 and "started" not in only.stdout


def test_jobs_are_fresh_processes_forked_from_one_that_has_imported_the_target(tmp_path):
    assert call(tmp_path, 1, "ok", "ok").returncode == 0
    one, other = facts(tmp_path)
    assert one["pid"] != other["pid"] and one["forked_from_importer"] and other["forked_from_importer"]
    assert one["ended"] <= other["began"]


def test_a_slot_has_one_job_at_a_time_and_its_own_environment(tmp_path):
    assert call(tmp_path, 2, "ok", "ok", "ok", "ok").returncode == 0
    by_slot = {slot: [each for each in facts(tmp_path) if each["CUDA_VISIBLE_DEVICES"] == slot] for slot in ("0", "1")}
    assert sum(map(len, by_slot.values())) == 4 and all(by_slot.values())
    for mine in by_slot.values():
        mine.sort(key=lambda each: each["began"])
        assert all(earlier["ended"] <= later["began"] for earlier, later in zip(mine, mine[1:]))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {each["OMP_NUM_THREADS"] for each in facts(tmp_path)} == {str(threads)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_process_behind(tmp_path, number):
    marker = f"QUEUE_TEST={tmp_path}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "QUEUE_TEST": str(tmp_path)}
    arguments = command(tmp_path, 2, "save", "hang", "ok")
    launcher = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: len(facts_written(tmp_path)) == 2)
    time.sleep(0.5)
    assert len(alive(marker)) >= 4  # launcher, fork server, two jobs
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=60)
    wait_until(lambda: not alive(marker))
    assert not (tmp_path / "2-ok" / "facts.json").exists()
    if number != signal.SIGKILL:
        assert launcher.returncode == 128 + number
        assert "0-save interrupted" in output and "The same command again" in output


def test_what_a_job_leaves_running_is_ended_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QUEUE_TEST", str(tmp_path))
    assert call(tmp_path, 1, "orphan").returncode == 0
    wait_until(lambda: not alive(f"QUEUE_TEST={tmp_path}"))


FINISHED = '{"outcome": "finished", "val/ce": 5.307, "tokens_per_second": 31400.0, "seconds": 60}'


@pytest.mark.parametrize("ends", ["finished", "diverged", "dead", "never"])
def test_a_run_that_another_process_trains_is_waited_for_and_its_files_are_left_alone(tmp_path, ends):
    shared, own = tmp_path / "0-ok", tmp_path / "1-ok"
    with held(shared):
        for name in ("console.log", "error.txt"):
            (shared / name).write_text("the other's\n")
        before = {path.name: path.read_bytes() for path in shared.iterdir()}
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        arguments = command(tmp_path, 1, "ok", "ok")
        launcher = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_until((own / "result.json").exists)
        assert {path.name: path.read_bytes() for path in shared.iterdir()} == before
        if ends == "never":
            launcher.send_signal(signal.SIGINT)
            launcher.wait(60)
        if ends in ("finished", "diverged"):
            (shared / "result.json").write_text(FINISHED.replace("finished", ends).replace("{", '{"step": 7, '))
    printed, said = launcher.communicate(timeout=60)
    assert said == "" and printed.count("0-ok is being trained by another process: waits for that\n") == 1
    assert launcher.returncode == {"finished": 0, "dead": 0, "diverged": 1, "never": 130}[ends]
    assert (shared / "facts.json").exists() == (ends == "dead")
    line = {
        "finished": "0-ok finished in 60 s: validation ce 5.31, 31.4k tokens/s (by another process)\n",
        "diverged": "0-ok diverged at step 7 after 60 s (by another process)\n",
        "dead": "0-ok finished in 0 s",
        "never": "1 of 2 jobs are finished",
    }[ends]
    assert line in printed and "failed" not in printed
    assert ("0-ok is left to another process\n" in printed) == (ends == "never")


def test_a_job_whose_run_another_process_begins_first_writes_nothing_and_is_tried_again(tmp_path):
    done = call(tmp_path, 1, "busy_at_first")
    assert done.returncode == 0 and done.stderr == "" and "failed" not in done.stdout
    assert (tmp_path / "0-busy_at_first" / "console.log").read_text() == "this is busy_at_first\n" * 2


def facts_written(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/facts.json") if path.stat().st_size]


def test_progress_is_the_last_complete_training_line(tmp_path):
    job = Job(tmp_path, DictConfig({}), began=time.time())
    assert job.doing() == "starting, 0 s"
    line = {"step": 50, "steps": 200, "tokens": 100_000, "train/ce": 6.25, "tokens_per_second": 20_000.0}
    lines = [
        json.dumps(line | {"step": 40}),
        json.dumps(line),
        '{"step": 50, "val/ce": 6.0}',
        '{"step": 60, "train/ce": 6.1, "tok',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert job.doing() == "step 50/200, ce 6.25, 20.0k tokens/s, 15 s to go"  # 300,000 tokens at 20,000 a second
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | {"step": 200}) + "\n")
    assert job.doing() == "step 200/200, ce 6.25, 20.0k tokens/s, evaluating"


def test_time_to_go_counts_the_jobs_left_at_the_pace_of_those_finished(tmp_path):
    ended, running, left = (Job(tmp_path / name, DictConfig({}), began=time.time() - 10) for name in "abc")
    ended.status, ended.seconds = 0, 30.0
    queue = Queue([ended, running, left], [{}], behave, (), 1.0)
    queue.running[queue.waiting.pop(0)] = None  # type: ignore[assignment]
    overall, one = queue.progress()
    assert overall == "1 finished, 1 running, 1 left, 0 failed, 50 s to go" and one == "  b starting, 10 s"
    assert [duration(seconds) for seconds in (14.2, 180, 7500)] == ["14 s", "3 min", "2 h 05 min"]


def test_a_slot_is_a_visible_gpu_times_jobs_per_gpu_or_else_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "sweeps")
    launcher = importlib.import_module("hydra_plugins.local_queue").LocalQueue(2, 3, 20)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in launcher.slots("auto", 1)] == ["0", "1", "0", "1"]
    assert launcher.slots("cpu", 1) == [{}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in launcher.slots("cuda", 1)] == ["5", "7", "5", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launcher.slots("auto", 1) == [{}] * 3
    assert type(launcher)(2, None, 20).slots("cpu", 5) == [{}] * 5


@pytest.mark.parametrize(("share", "expected"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("", 8)])
def test_a_container_s_share_of_the_cores_is_what_counts(share, expected, tmp_path, monkeypatch):
    if share:
        (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(threads, "SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    assert threads.cores() == expected


def multirun(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    arguments = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        f"runs={folder}/runs",
        "wandb.mode=disabled",
        *overrides,
    ]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=200)


def test_a_sweep_with_one_wrong_job_starts_nothing_and_names_it(tmp_path):
    done = multirun(tmp_path, "router=dense", "model.num_heads=4,7")
    assert done.returncode == 2 and done.stdout == ""
    assert "model.num_heads=7" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/dense-*"))


def test_a_run_that_another_process_finished_meanwhile_is_no_failure(tmp_path, capsys):
    done, lost = (Job(tmp_path / name, DictConfig({}), status=1) for name in ("done", "lost"))
    done.folder.mkdir()
    (done.folder / "result.json").write_text('{"outcome": "finished", "val/ce": 5.0, "tokens_per_second": 1.0}')
    assert Queue([done, lost], [{}], print, (), 1.0).conclude() == 1
    printed = capsys.readouterr().out
    assert "1 of 2 jobs are finished" in printed and "  lost failed" in printed and "  done" not in printed


def test_a_sweep_makes_equal_jobs_once_records_its_runs_and_does_nothing_twice(tmp_path, tiny):
    sweep = [*tiny, "seed=0,1,1", "train.steps=1", "train.warmup_steps=0", "model.sparse_layers=[]"]
    first = multirun(tmp_path, *sweep)
    assert first.returncode == 0, first.stderr + first.stdout
    assert "2 of 2 jobs are finished" in first.stdout and first.stderr == ""
    assert first.stdout.count("The grid's 3 combinations come to 2 runs, as some are one and the same.\n") == 1
    runs = json.loads((tmp_path / "runs" / "sweeps" / "sweep.json").read_text())["runs"]
    assert [name.rsplit("-", 1)[0] for name in runs] == ["dense-s0", "dense-s1"]
    assert all((tmp_path / "runs" / name / "result.json").exists() for name in runs)
    again = multirun(tmp_path, *sweep)
    assert again.returncode == 0 and "2 of 2 jobs are finished already: skipped" in again.stdout
    assert "started" not in again.stdout and "listed other runs" not in again.stdout
    other = multirun(tmp_path, *sweep, "seed=2").stdout
    assert "The grid's" not in other
    assert "sweep.json listed other runs: that list is sweep.smoke.json now; sweep=NAME gives" in other
    assert re.search(r"\n  what makes it again: python .*run.py .*seed=0,1,1", other)
    assert json.loads((tmp_path / "runs" / "sweeps" / "sweep.smoke.json").read_text())["runs"] == runs


if __name__ == "__main__":
    folder, slots, *behaviours = sys.argv[1:]
    environments = [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(int(slots))]
    from tests.test_local_queue import behave  # noqa: F811, under the name by which the fork server imports it

    sys.exit(Queue(make_jobs(Path(folder), behaviours), environments, behave, (), 1.0).run())
