"""Switchyard's entry point. One run: python run.py router=switch. A sweep: python run.py -m sweeps=quickstart."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing pages; main() makes one line of it
sys.path[:0] = [str(ROOT)]  # from any folder
sys.path.append(str(ROOT / "sweeps"))  # Hydra finds plugins in sweeps/hydra_plugins

import hydra  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from training import job  # noqa: E402
from training.targets import one_line  # noqa: E402


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def composed(config: DictConfig) -> None:
    sys.exit(job.run(config))


def main() -> None:
    """Exit with 0 when done, 2 and one line on standard error for what is wrong before any work, else as job.run."""
    try:
        composed()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
