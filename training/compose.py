"""The config that run.py would compose, for the other commands that take its overrides."""

import sys
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from training.tuning import settle

ROOT = Path(__file__).resolve().parent.parent
FROM_HYDRA = ("arm", "scale", "sweep", "space")  # keys that mostly name a choice of Hydra's


def composed(overrides: list[str]) -> DictConfig:
    """What these words on run.py's command line give. Raises HydraException or OmegaConfBaseException as Hydra does."""
    for path in (str(ROOT / "sweeps"), str(Path.cwd())):  # Hydra's plugins; the user's own package
        if path not in sys.path:
            sys.path.append(path)
    with warnings.catch_warnings(), initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        warnings.simplefilter("ignore")
        config = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # of which arm, scale and sweep are read
    settle(apart(config), overrides)
    return config


def apart(config: DictConfig) -> DictConfig:
    """A composed config without Hydra's node, what is read of which is set. In place."""
    with open_dict(config):
        for key in FROM_HYDRA:
            config[key] = config[key]
        config.pop("hydra", None)
    return config
