"""Shows what the jobs of a sweep do: live on a terminal, as plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sweeps.job import Job, duration, rate


class Display:
    """A context of the queue, which calls started, ended and, several times a second, update."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.jobs, self.slots = jobs, slots
        self.console = Console(soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.began = self.said = time.time()

    def __enter__(self) -> "Display":
        skipped = sum(job.status is not None for job in self.jobs)
        if skipped:
            self.say(f"{skipped} of {len(self.jobs)} jobs are finished already: skipped")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))

    def started(self, job: Job) -> None:
        if not self.live:
            self.say(f"{self.count()} {job.folder.name} started")

    def ended(self, job: Job) -> None:
        self.say(f"{self.count()} {job.folder.name} {job.outcome()}", "red" if job.status else "")

    def update(self) -> None:
        """Redraws the lines on a terminal; elsewhere prints them after 15 s, later ever more rarely."""
        now = time.time()
        if self.live:
            self.live.update(Text("\n".join(self.lines()), no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self.said > max(15, (now - self.began) / 20):
            self.said = now
            self.say("\n".join(self.lines()))

    def summary(self) -> None:
        """The last lines: all is well, or what is not finished, why, and how to go on."""
        finished = sum(job.status == 0 for job in self.jobs)
        self.say(f"{finished} of {len(self.jobs)} jobs are finished, after {duration(time.time() - self.began)}")
        for job in self.jobs:
            if job.status:
                self.say(f"  {job.folder.name} {job.outcome()}\n    {job.console}")
        if finished < len(self.jobs):
            self.say("The same command again goes on from here; what is finished is not repeated.")

    def count(self) -> str:
        ended, total = sum(job.status is not None for job in self.jobs), len(self.jobs)
        return f"[{ended:>{len(str(total))}}/{total}]"

    def lines(self) -> list[str]:
        """One for the sweep and one for each running job."""
        running = [job for job in self.jobs if job.running]
        left = sum(job.waiting for job in self.jobs)
        failed = sum(bool(job.status) for job in self.jobs)
        to_go = self.to_go(running, left)
        overall = f"{self.count()} {len(running)} running, {left} left, {failed} failed"
        return [
            overall + (f", {duration(to_go)} to go" if to_go is not None else ""),
            *map(self.line, running),
        ]

    def line(self, job: Job) -> str:
        now, to_go = job.progress(), job.to_go()
        if to_go is None:
            return f"  {job.folder.name} starting, {duration(time.time() - job.began)}"
        progress = f"step {now['step']}/{now['steps']}, ce {now['train/ce']:.2f}, {rate(now)}"
        return f"  {job.folder.name} {progress}, {duration(to_go)} to go"

    def to_go(self, running: Sequence[Job], left: int) -> float | None:
        """Seconds until all is done, if the jobs left take as long as those seen; None if none was seen."""
        now = time.time()
        known = {job: seconds for job in running if (seconds := job.to_go()) is not None}
        seen = [job.seconds for job in self.jobs if job.process and job.status == 0]
        seen = seen or [now - job.began + seconds for job, seconds in known.items()]
        if not seen:
            return None
        typical = sum(seen) / len(seen)
        rest = [known.get(job, max(0.0, typical - (now - job.began))) for job in running]
        return max([(sum(rest) + left * typical) / self.slots, *rest])
