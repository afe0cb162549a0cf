"""Lets Hydra find the configuration by absolute path, so that commands work from any folder."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

ROOT = Path(__file__).resolve().parents[2]


class RepositorySearchPath(SearchPathPlugin):
    """Adds conf/, and the repository's root, below which sweeps/*.yaml are the config group `sweeps`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("switchyard", f"file://{ROOT}/conf")
        search_path.append("switchyard", f"file://{ROOT}")
