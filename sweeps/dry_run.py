"""`dry_run=true`: what a run or a sweep would do, as a table. Nothing is written or started."""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from analysis.arms import plural
from data.prepare import NotPrepared
from sweeps.estimate import Cost, Pace, cost
from sweeps.job import duration
from sweeps.plan import Planned, errors, merged, states
from training.build import choose_device, find_data
from training.job import open_run
from training.settings import Settings

HEADERS = ["arm", "seed", "run", "parameters\nactive / total", "GFLOPs\na token", "tokens", "memory", "time", "state"]

UNKNOWN = "unknown"  # of epochs over a text that is not prepared


def single(settings: Settings) -> Planned:
    """One run's job. Raises ValueError as open_run does."""
    try:
        return Planned([], None, settings, open_run(settings, open_data=find_data))
    except NotPrepared:
        return Planned([], None, settings)


def report(planned: Sequence[Planned]) -> int:
    """Print the table. Exit status: 0, or 2 if a job is invalid, each of which is named."""
    rows, known, left, why = {}, {}, {}, set()
    pace = {runs: Pace(Path(runs)) for runs in {each.settings.runs for each in planned if each.settings}}
    stand = states(planned)
    for each in planned:
        if (settings := each.settings) is None:
            continue
        try:
            key = counted(settings)
            known[key] = known.get(key) or cost(settings, each.run)
        except ValueError as error:
            each.error = str(error)
            continue
        seconds, basis = pace[settings.runs].seconds(settings, known[key])
        state = stand[each.run.folder] if each.run else "left"
        time = "" if state == "done" else UNKNOWN if seconds is None else duration(seconds)
        rows.setdefault(each.name, [settings.arm, settings.seed, each.name, *figures(known[key]), time, state])
        if state != "done":
            why |= {basis} - {""}
            left[each.name] = seconds
    if rows:
        print(tabulate(rows.values(), HEADERS, disable_numparse=True))
        print("\n" + summary(planned, [*rows.values()], left, why))
    invalid = errors(planned)
    for line in invalid:
        print(f"invalid: {line}")
    return 2 if invalid else 0


def for_gpus(settings: Settings) -> bool:
    """It has a scale that is made for a GPU, and goes without one."""
    return settings.scale != "smoke" and choose_device(settings).type == "cpu"


def patience(planned: Sequence[Planned]) -> str:
    """Of runs as for_gpus says: how long those that are not done will take; "" if all are done."""
    stand = states(planned)
    left = {each.name: each for each in planned if not each.run or stand[each.run.folder] != "done"}
    found = [(each.settings, each.run) for each in left.values() if each.settings]
    if not found:
        return ""
    pace, scales = Pace(Path(found[0][0].runs)), sorted({settings.scale for settings, _ in found})
    times = [pace.seconds(settings, cost(settings, run))[0] for settings, run in found]
    known = [seconds for seconds in times if seconds is not None]
    time = f"about {duration(sum(known))}" if known else "an unknown time"
    return f"without a GPU scale={','.join(scales)} takes {time} on these cores (scale=smoke is for CPUs)"


def counted(settings: Settings) -> str:
    """Equal for settings that cost the same."""
    train, text = settings.train, (settings.tokenizer, settings.data)
    parts = settings.model, settings.experts, settings.router, settings.num_experts, *text
    return repr((*parts, train.steps, train.epochs, train.batch_size, train.micro_batch))


def figures(cost: Cost) -> list[str]:
    parameters = f"{cost.active / 1e6:.1f}M / {cost.total / 1e6:.1f}M"
    tokens = UNKNOWN if cost.tokens is None else f"{cost.tokens / 1e6:.1f}M"
    memory = f"{cost.memory / 1e9:.1f} GB" if cost.memory >= 1e9 else f"{cost.memory / 1e6:.0f} MB"
    return [parameters, f"{cost.flops / 1e9:.3f}", tokens, memory]


def summary(planned: Sequence[Planned], rows: list[list], left: dict[str, float | None], why: set[str]) -> str:
    runs = {row[2]: row[-1] for row in rows}
    done = sum(state == "done" for state in runs.values())
    lines = [f"{len(runs)} {plural('job', len(runs))}: {done} done, {len(left)} to make"]
    if left:
        known = [seconds for seconds in left.values() if seconds is not None]
        lines[0] += f" in about {duration(sum(known))} one after the other" if known else ""
        lines[0] += ", and those of unknown length" if 0 < len(known) < len(left) else ""
    lines += merged(sum(each.error == "" for each in planned), len(runs))
    if why:
        lines.append(
            f"Estimates: memory of tensors, not of Python and libraries; time from {' and '.join(sorted(why))}."
        )
    if any(each.settings and not each.run for each in planned):
        unknown = "ids, which runs are done, and whether each split holds a window"
        lines.append(f"Its text is not prepared yet: {unknown}, are known when it is.")
    return "\n".join(lines)
