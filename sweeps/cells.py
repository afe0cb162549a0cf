"""What a sweep's table compares: runs under their arms' labels and seeds, by which a report has to tell them apart."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis.arms import repeated
from sweeps.composing import Composer
from sweeps.plan import Planned
from training.start import is_called

Cell = tuple[str, int, str]  # arm, seed and the run's name


def cells_of(planned: Sequence[Planned], arm_of: Callable[[Planned], str] | None = None) -> dict[Cell, Planned]:
    """The first job of each cell; a grid may give one several times, as a dense run for each number of experts.

    Without invalid jobs, and those whose runs later ones start from. arm_of: for other labels than the jobs' own.
    """
    found: dict[Cell, Planned] = {}
    for place, job in enumerate(planned):
        starts = {later.settings.train.init_from or "" for later in planned[place + 1 :] if later.settings} - {""}
        own, folder = job.settings, str(job.run.folder) if job.run else None
        if own is None or folder in starts:
            continue
        if not any(is_called(own, start) for start in starts - {own.train.init_from}):
            found.setdefault((arm_of(job) if arm_of else own.arm, own.seed, job.name), job)
    return found


def require_apart(planned: Sequence[Planned], compose: Composer) -> None:
    """ValueError, in one line, if an arm has several runs of a seed: in what they differ, and what keeps them apart."""
    cells = cells_of(planned)
    alike = {twice: [job for cell, job in cells.items() if cell[:2] == twice] for twice in several(cells)}
    if not alike:
        return
    (arm, seed), (one, other, *_) = next(iter(alike.items()))
    first, second = (shlex.join(differing(job, [one, other])) for job in (one, other))
    name = naming(planned, [*alike.values()], compose)
    remedy = f"make a sweep of each, {first} sweep=NAME and {second} sweep=OTHER"
    remedy = f"to name an arm for each add {shlex.quote(name)}" if name else remedy
    twice = f"{arm} would have seed {seed} twice, with {first} and with {second}"
    raise ValueError(f"{twice}, and a report takes a seed of an arm once; {remedy}")


def groups_of(cells: dict[Cell, Planned]) -> dict[str, str]:
    """arm -> what names its text and token budget, where one call asks for several: a report compares arms within each.
    {} unless each arm has one, and each of them several arms or all of them one, as in a grid over dictionaries, texts
    or steps: an arm that alone differs from the rest is no group. Trials are left out."""
    of_arm: dict[str, set[str]] = {}
    for (arm, _, _), job in cells.items():
        if job.run and job.run.settings.trial is None:
            data, train = job.run.settings.data, job.run.settings.train
            budget = train.steps * train.batch_size * data.sequence_length
            of_arm.setdefault(arm, set()).add(f"{job.run.prepared.fingerprint[:12]}, {budget} tokens")
    arms = Counter(group for groups in of_arm.values() for group in groups)
    crossed = len(arms) > 1 and arms.total() == len(of_arm) and (1 not in arms.values() or set(arms.values()) == {1})
    return {arm: groups.pop() for arm, groups in of_arm.items()} if crossed else {}


def several(cells: Iterable[Cell]) -> list[tuple[str, int]]:
    """Arm and seed of which there are several runs."""
    return repeated((arm, seed) for arm, seed, _ in cells)


def differing(job: Planned, jobs: Sequence[Planned]) -> list[str]:
    """The job's overrides that not all of these have."""
    return [word for word in job.words if any(word not in each.words for each in jobs)]


def naming(planned: Sequence[Planned], alike: list[list[Planned]], compose: Composer) -> str:
    """The override of arm whose labels end with the values in which jobs of one cell differ, so that no cell has two
    runs and there are as few arms as can be; "" if there is none, as where the labels are made in several ways now."""
    valid = [job for job in planned if job.settings]
    labels = {job.settings.arm for job in valid if job.settings}
    if len(labels) > 1:
        labels = {OmegaConf.to_container(compose.config(job.words))["arm"] for job in valid}  # type: ignore[index]
    words = [word for jobs in alike for job in jobs for word in differing(job, jobs)]
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+") for word in words)
    values = [value_of(key, [job for jobs in alike for job in jobs], compose) for key in keys]
    if len(labels) > 1 or not all(values):
        return ""
    label, end, arms = labels.pop(), "_" + "_".join(values), {}
    # Hydra's grammar wants quotes around what has one interpolation in another; a dense run may have no use for the end
    for word in (f"arm={label}{end}", f'arm="{label}{end}"', f'arm="{label}${{if_routed:{end}}}"'):
        with suppress(HydraException, OmegaConfBaseException):
            cells = cells_of(valid, lambda job, word=word: str(compose.config([*job.words, word]).arm))
            if all(fits(arm) for arm, _, _ in cells) and not several(cells):
                arms[word] = len({arm for arm, _, _ in cells})
    return min(arms, key=lambda word: arms[word], default="")


def value_of(key: str, jobs: Sequence[Planned], compose: Composer) -> str:
    """The interpolation that puts into a label what a key has in these jobs: its value, first element or choice; "" if
    none of these is fit for a label."""
    for value in (f"${{{key}}}", f"${{{key}.0}}", f"${{hydra:runtime.choices.{key}}}"):
        with suppress(HydraException, OmegaConfBaseException):
            found = {str(compose.config([*job.words, f"arm={value}"]).arm) for job in jobs}
            if all(map(fits, found)):
                return value
    return ""


def fits(label: str) -> bool:
    """Whether it reads well as an arm's label and a folder's name."""
    return re.fullmatch(r"[\w.+-]+", label) is not None
