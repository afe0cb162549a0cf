"""A queue of jobs on one machine: a fresh process each, in which whatever happens harms no other job.

Jobs fork from a server that has imported everything and done nothing: they start in 0.1 s and may use CUDA.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from omegaconf import OmegaConf

from sweeps.display import Display
from sweeps.job import Job

ROOT = Path(__file__).resolve().parents[1]


class Queue:
    """Runs jobs in their order, as many at once as there are slots.

    slots: the environment variables that each gives its jobs, e.g. {"CUDA_VISIBLE_DEVICES": "0"}
    target: "module:function" that gets the job's config (DictConfig) and returns its exit status
    preload: modules that the server imports besides the target's
    grace_seconds: between SIGTERM and SIGKILL
    """

    def __init__(
        self, jobs: list[Job], slots: list[dict[str, str]], target: str, preload: tuple[str, ...], grace_seconds: float
    ):
        self.jobs, self.free, self.target, self.grace_seconds = jobs, list(slots), target, grace_seconds
        self.signals: list[int] = []  # SIGINT and SIGTERM received
        self.display = Display(jobs, len(slots))
        multiprocessing.get_context("forkserver").set_forkserver_preload([*preload, target.split(":")[0]])
        # The server reads these when it starts, with the first job. Python 3.11 hands it no sys.path, and it
        # skips what it cannot import. OpenBLAS starts threads at import; what has threads should not fork.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // len(slots)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin make a busy machine 5 times slower

    def run(self) -> bool:
        """Runs all jobs without a status, until SIGINT or SIGTERM (see signals). True if all are finished."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits that: Ctrl-C reaches jobs by this process
        forkserver.ensure_running()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: self.signals.append(number))
        try:
            while self.running() or (self.waiting() and not self.signals):
                self.turn()
        finally:
            for job in self.running():  # only if the loop itself failed
                send(job, signal.SIGKILL)
        self.display.summary()
        return all(job.status == 0 for job in self.jobs)

    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.running]

    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.waiting]

    def turn(self) -> None:
        """Starts what can start, waits a moment, and looks after what runs."""
        for job in [] if self.signals else self.waiting()[: len(self.free)]:
            self.start(job)
        connection.wait([job.process.sentinel for job in self.running() if job.process], timeout=0.25)
        for job in self.running():
            if job.process and job.process.exitcode is not None:
                self.end(job, job.process.exitcode)
            elif self.signals:
                self.stop(job)
        self.display.update()

    def start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.txt").unlink(missing_ok=True)  # an earlier attempt's
        job.slot, job.began = self.free.pop(0), time.time()
        arguments = (self.target, job.config, str(job.folder / "console.log"), job.slot, self.grace_seconds)
        job.process = ForkServerProcess(target=child, args=arguments)
        job.process.start()
        self.display.event(job, "started")

    def end(self, job: Job, status: int) -> None:
        send(job, signal.SIGKILL)  # to what it left behind in its group
        job.status, job.seconds = status, time.time() - job.began
        self.free.append(job.slot)
        self.display.event(job, job.outcome())

    def stop(self, job: Job) -> None:
        """SIGTERM, upon which a job saves and exits with 75; SIGKILL when the time of grace is over."""
        if job.kill_at and time.time() > job.kill_at:
            send(job, signal.SIGKILL)
        elif not job.kill_at and send(job, signal.SIGTERM):
            job.kill_at = time.time() + self.grace_seconds
            self.display.event(job, f"has {self.grace_seconds:g} s to save its state")


def send(job: Job, number: int) -> bool:
    """Signals the job's process group; False if there is none: too young to have one, or all gone."""
    if not (job.process and job.process.pid):
        return False
    with suppress(ProcessLookupError):
        os.killpg(job.process.pid, number)
        return True
    return False


def child(target: str, config: str, console: str, environment: dict[str, str], grace_seconds: float) -> None:
    """What a job's process does: a session of its own, its output into console.log, then the target."""
    os.setsid()
    threading.Thread(target=end_with_launcher, args=(grace_seconds,), daemon=True).start()
    os.environ.update(environment)
    log = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # by lines: a killed job loses none
    module, function = target.split(":")
    sys.exit(getattr(importlib.import_module(module), function)(OmegaConf.create(config)))


def end_with_launcher(grace_seconds: float) -> None:
    """Ends this process's group when the launcher is gone, even by SIGKILL."""
    launcher = multiprocessing.parent_process()
    assert launcher
    connection.wait([launcher.sentinel])
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace_seconds)
    os.killpg(0, signal.SIGKILL)
