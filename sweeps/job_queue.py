"""A queue of jobs on one machine: a fresh process each, in which whatever happens harms no other job."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, parent_process
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from omegaconf import DictConfig

from sweeps.job import Job, duration
from sweeps.standing import standing
from training.folder import Busy
from training.threads import cores

BUSY = 76  # exit status: another process has the run


@dataclass
class Queue:
    """Runs jobs in their order, as many at once as there are slots, and prints how they fare. What another process
    trains is left to it and waited for; should that process end without a result, it is made here."""

    jobs: list[Job]
    slots: list[dict[str, str]]  # the environment variables that each gives its jobs, {"CUDA_VISIBLE_DEVICES": "0"}
    target: Callable[[DictConfig], int]  # gets a job's config and returns its exit status
    preload: tuple[str, ...]  # modules that the server imports besides the target's; it skips what it cannot import
    grace_seconds: float  # between SIGTERM and SIGKILL

    def __post_init__(self) -> None:
        self.waiting = [job for job in self.jobs if job.status is None]
        self.running: dict[Job, ForkServerProcess] = {}
        self.free = list(self.slots)
        self.elsewhere: set[Job] = set()  # what another process was seen to train
        self.signals: list[int] = []  # SIGINT and SIGTERM received
        self.began = self.said = time.time()

    def run(self) -> int:
        """Runs what has no status. Exit status: 0 if all jobs are finished, 128 + N if signal N stopped it, else 1."""
        if skipped := len(self.jobs) - len(self.waiting):
            print(f"{skipped} of {len(self.jobs)} jobs are finished already: skipped", flush=True)
        if self.waiting:
            self.start_server()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: self.signals.append(number))
        try:
            while self.running or (self.waiting and not self.signals):
                self.turn()
        finally:
            for process in self.running.values():  # only if the loop itself failed
                send(process, signal.SIGKILL)
        return self.conclude()

    def start_server(self) -> None:
        """Jobs fork from one that has imported everything and done nothing: they start in 0.1 s and may use CUDA."""
        root = str(Path(__file__).resolve().parents[1])  # Python 3.11 hands the server no sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # at import; CUDA's own would spoil it for forks
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # it starts threads at import; what has threads should not fork
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // len(self.slots)))
        for each in (signal.SIGINT, signal.SIGTERM):  # the server inherits that: only this process stops jobs, also if
            signal.signal(each, signal.SIG_IGN)  # Ctrl-C or a cluster signals the whole group
        forkserver.set_forkserver_preload([*self.preload, self.target.__module__])
        forkserver.ensure_running()

    def turn(self) -> None:
        """Starts what can start, waits a moment, and looks after what runs."""
        for job in list(self.waiting):
            if job.after is not None and job.after.status:  # what it starts from will not be made today
                self.waiting.remove(job)
                job.status = 1
                self.say(job, job.outcome())
            elif self.free and not self.signals and (job.after is None or job.after.status == 0):
                self.take(job)
        connection.wait([process.sentinel for process in self.running.values()], timeout=0.25)
        for job, process in list(self.running.items()):
            if process.exitcode is not None:
                send(process, signal.SIGKILL)  # to what it left behind in its group
                del self.running[job]
                self.free.append(job.slot)
                if process.exitcode == BUSY:  # another one began it just before
                    job.began = 0.0
                    self.waiting.insert(0, job)
                    continue
                job.status, job.seconds = process.exitcode, time.time() - job.began
                self.say(job, job.outcome())
            elif 0 < job.kill_at < time.time():
                send(process, signal.SIGKILL)
            elif self.signals and not job.kill_at and send(process, signal.SIGTERM):  # it saves and exits with 75
                job.kill_at = time.time() + self.grace_seconds
                self.say(job, f"has {self.grace_seconds:g} s to save its state")
        if time.time() - self.said > max(15, (time.time() - self.began) / 20):  # ever more rarely
            self.said = time.time()
            print("\n".join(self.progress()), flush=True)

    def take(self, job: Job) -> None:
        """Starts it, unless another process trains it, or has made it meanwhile."""
        if standing(job.folder) == "running":
            if job not in self.elsewhere:
                self.elsewhere.add(job)
                self.say(job, "is being trained by another process: waits for that")
            return
        self.waiting.remove(job)
        if result := job.result():
            job.status, job.seconds = int(result["outcome"] != "finished"), result["seconds"]
            self.say(job, f"{job.outcome()} (by another process)")
        else:
            self.start(job)

    def start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.txt").unlink(missing_ok=True)  # an earlier attempt's
        job.slot, job.began = self.free.pop(0), time.time()
        process = ForkServerProcess(target=child, args=(self.target, job, self.grace_seconds))
        process.start()
        self.running[job] = process
        self.say(job, "started")

    def say(self, job: Job, what: str) -> None:
        finished, total = sum(each.status == 0 for each in self.jobs), len(self.jobs)
        print(f"[{finished:>{len(str(total))}}/{total}] {job.folder.name} {what}", flush=True)

    def progress(self) -> list[str]:
        """A line for the sweep, its time to go if each job takes as long as those finished, and one a running job."""
        finished, failed = sum(job.status == 0 for job in self.jobs), sum(bool(job.status) for job in self.jobs)
        overall = f"{finished} finished, {len(self.running)} running, {len(self.waiting)} left, {failed} failed"
        if took := [job.seconds for job in self.jobs if job.began and job.status == 0]:
            typical = sum(took) / len(took)
            rest = [max(0.0, job.began + typical - time.time()) for job in self.running]
            overall += f", {duration((sum(rest) + typical * len(self.waiting)) / len(self.slots))} to go"
        return [overall, *(f"  {job.folder.name} {job.doing()}" for job in self.running)]

    def conclude(self) -> int:
        """Prints that all is well, or what is not finished, why, and how to go on. Returns the exit status."""
        for job in self.jobs:
            if job.result().get("outcome") == "finished":  # by another process, if not by this one's
                job.status = 0
        finished, total = sum(job.status == 0 for job in self.jobs), len(self.jobs)
        print(f"{finished} of {total} jobs are finished, after {duration(time.time() - self.began)}")
        for job in self.jobs:
            if job.status:
                print(f"  {job.folder.name} {job.outcome()}\n    {job.folder / 'console.log'}")
            elif job.status is None and job in self.elsewhere:
                print(f"  {job.folder.name} is left to another process")
        if finished == total:
            return 0
        print("The same command again goes on from here; what is finished is not repeated.")
        return 128 + self.signals[0] if self.signals else 1


def send(process: ForkServerProcess, number: int) -> bool:
    """Signals a job's process group; False if there is none: too young to have one, or all gone."""
    assert process.pid
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def child(target: Callable[[DictConfig], int], job: Job, grace_seconds: float) -> None:
    """What a job's process does: a session of its own, its output into console.log, then the target. If another
    process has the run, it writes nothing there."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_launcher, args=(grace_seconds,), daemon=True).start()
    os.environ.update(job.slot)
    sys.stdout = open(job.folder / "console.log", "a", buffering=1)  # by lines: a killed job loses none
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    try:
        sys.exit(target(job.config))
    except Busy:
        sys.exit(BUSY)


def end_with_launcher(grace_seconds: float) -> None:
    """Ends this process's group when the launcher is gone, even by SIGKILL."""
    launcher = parent_process()
    assert launcher
    connection.wait([launcher.sentinel])
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace_seconds)
    os.killpg(0, signal.SIGKILL)
