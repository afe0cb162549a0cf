"""What a sweep prints: a line for each start and end, from time to time how far it is, at the end what failed."""

import time
from collections.abc import Sequence

from sweeps.job import Job, duration, rate


class Display:
    def __init__(self, jobs: Sequence[Job], slots: int):
        self.jobs, self.slots = jobs, slots
        self.began = self.said = time.time()
        if skipped := sum(job.status is not None for job in jobs):
            say(f"{skipped} of {len(jobs)} jobs are finished already: skipped")

    def event(self, job: Job, what: str) -> None:
        ended, total = sum(job.status is not None for job in self.jobs), len(self.jobs)
        say(f"[{ended:>{len(str(total))}}/{total}] {job.folder.name} {what}")

    def update(self) -> None:
        """How far it is, after 15 s and later ever more rarely."""
        now = time.time()
        if now - self.said > max(15, (now - self.began) / 20):
            self.said = now
            say("\n".join(self.lines()))

    def summary(self) -> None:
        """The last lines: all is well, or what is not finished, why, and how to go on."""
        finished = sum(job.status == 0 for job in self.jobs)
        say(f"{finished} of {len(self.jobs)} jobs are finished, after {duration(time.time() - self.began)}")
        for job in self.jobs:
            if job.status:
                say(f"  {job.folder.name} {job.outcome()}\n    {job.folder / 'console.log'}")
        if finished < len(self.jobs):
            say("The same command again goes on from here; what is finished is not repeated.")

    def lines(self) -> list[str]:
        """One for the sweep and one for each running job."""
        running = [job for job in self.jobs if job.running]
        done, left = (sum(job.status == 0 for job in self.jobs), sum(job.waiting for job in self.jobs))
        failed = len(self.jobs) - done - left - len(running)
        seconds = self.to_go()
        overall = f"{done} finished, {len(running)} running, {left} left, {failed} failed"
        to_go = f", {duration(seconds)} to go" if seconds is not None else ""
        return [overall + to_go, *(f"  {job.folder.name} {doing(job)}" for job in running)]

    def to_go(self) -> float | None:
        """Seconds until all is done, if each job takes as long as those that have ended; None before the first has."""
        took = [job.seconds for job in self.jobs if job.process and job.status == 0]
        if not took:
            return None
        typical = sum(took) / len(took)
        rest = [max(0.0, job.began + typical - time.time()) for job in self.jobs if job.running]
        return (sum(rest) + typical * sum(job.waiting for job in self.jobs)) / self.slots


def doing(job: Job) -> str:
    now, to_go = job.progress(), job.to_go()
    if to_go is None:
        return f"starting, {duration(time.time() - job.began)}"
    return f"step {now['step']}/{now['steps']}, ce {now['train/ce']:.2f}, {rate(now)}, {duration(to_go)} to go"


def say(text: str) -> None:
    print(text, flush=True)
