"""Switchyard's entry point. One run: python run.py router=switch. A sweep: python run.py -m sweeps=quickstart."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing pages; main() makes one line of it
sys.path[:0] = [str(ROOT)]  # from any folder
sys.path.append(str(ROOT / "sweeps"))  # Hydra finds plugins in sweeps/hydra_plugins

from training.threads import wait_briefly  # noqa: E402

wait_briefly()

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from sweeps import dry_run  # noqa: E402
from training import job  # noqa: E402
from training.compose import apart  # noqa: E402
from training.preflight import read  # noqa: E402
from training.targets import one_line  # noqa: E402
from training.tuning import settle  # noqa: E402


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """What is wrong before any work: one line on standard error and exit status 2, not a page."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def composed(config: DictConfig) -> None:
    with errors_as_one_line():
        hydra_config = HydraConfig.get()
        name = hydra_config.runtime.choices.get("sweeps")
        if name and hydra_config.mode == RunMode.RUN:
            raise ValueError(f"sweeps={name} is of many runs and needs -m: python run.py -m sweeps={name}")
        settle(apart(config), hydra_config.overrides.task)
        settings = read(config)
        if config.dry_run:
            sys.exit(dry_run.report([dry_run.single(settings)]))
        if dry_run.for_gpus(settings) and (line := dry_run.patience([dry_run.single(settings)])):
            print(line, flush=True)
        sys.exit(job.run(config))


def main() -> None:
    with errors_as_one_line():
        composed()


if __name__ == "__main__":
    main()
