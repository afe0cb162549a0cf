"""The jobs of a sweep as overrides, and overrides as configs, of which many come from one composition."""

import functools
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from training.compose import ROOT


class Composer:
    """words -> config, as Hydra's loader composes it. A composition takes 0.2 s and is made once for each choice of
    groups; values are set on a copy, after the groups, as Hydra does."""

    def __init__(self, loader: ConfigLoader, hydra_words: Sequence[str] = ()):
        assert isinstance(loader, ConfigLoaderImpl)
        self.loader, self.hydra_words = loader, list(hydra_words)
        self.parser = OverridesParser.create(config_loader=loader)
        self.made: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}

    def __call__(self, words: Sequence[str]) -> dict[str, Any]:
        """Resolved, without Hydra's node, and not yet settled (training.tuning). Raises as Hydra and OmegaConf do."""
        plain = OmegaConf.to_container(self.config(words), resolve=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    def config(self, words: Sequence[str]) -> DictConfig:
        """The same, not resolved; to be used before the next, of which Hydra's node is then read."""
        groups = tuple(word for word in words if self.chooses_a_group(word))
        if groups not in self.made:
            self.made[groups] = self.composed(groups)
        hydra, config = self.made[groups][0], deepcopy(self.made[groups][1])
        values = self.parser.parse_overrides([word for word in words if word not in groups])
        self.loader._apply_overrides_to_config(values, config)
        HydraConfig.instance().cfg = hydra  # type: ignore[assignment]  (for ${hydra:...}, as set_config leaves it)
        return config

    def composed(self, groups: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
        """Hydra's node alone, and all else."""
        whole = self.loader.load_configuration("config", [*self.hydra_words, *groups], RunMode.RUN)
        HydraConfig.instance().set_config(whole)
        with open_dict(whole):
            whole.pop("hydra")
        return HydraConfig.instance().cfg, whole  # type: ignore[return-value]

    @functools.cache  # noqa: B019  (lives as long as a sweep's planning)
    def chooses_a_group(self, word: str) -> bool:
        override = self.parser.parse_override(word)
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)


def jobs_of(words: Sequence[str]) -> tuple[Composer, list[list[str]]]:
    """The overrides of each job that `python run.py -m words` would have. Raises as Hydra does."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composer = Composer(GlobalHydra.instance().config_loader())
        given = composer.parser.parse_overrides(list(words))
        single = [word for word, override in zip(words, given) if not override.is_sweep_override()]
        config = compose("config", single, return_hydra_config=True)
        params = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create({}), resolve=True)
    assert isinstance(params, dict)
    own = composer.parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    return composer, BasicSweeper.split_arguments([*own, *given], None)[0]
