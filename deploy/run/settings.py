"""The settings of a run: how a command gets them, and what a resumed run may change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import PRESETS
from deploy.fetch import MODELS
from deploy.paths import absolute_path, path_or_name
from distill.config import RunConfig
from distill.config.load import load_config, override
from distill.config.tree import MAY_CHANGE, kept_settings
from distill.data import KNOWN_DATA
from distill.errors import ConfigError
from distill.files import write_json
from distill.run.folder import RunFolder


def load_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a configuration and make its paths absolute.

    Raises: ConfigError.
    """
    return absolute(load_config(path, overrides, PRESETS))


def absolute(config: RunConfig) -> RunConfig:
    """Replace ``~`` and relative paths by absolute ones; they count from the working directory.

    So a run can be resumed from another folder. Names of models and data that can be fetched, and hub ids, stay.
    """
    data = replace(config.data, path=path_or_name(config.data.path, KNOWN_DATA, "data.path"))
    sections: dict[str, Any] = {"data": data}
    for name in ("teacher", "student", "proxy"):
        section = getattr(config, name)
        if section.model is not None:
            sections[name] = replace(section, model=path_or_name(section.model, MODELS, f"{name}.model"))
    return replace(config, run_dir=str(absolute_path(config.run_dir, "run_dir")), **sections)


def config_to_resume(run_dir: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration that a run folder contains, with ``run_dir`` as the folder's present place.

    Raises: ConfigError when the folder is not a run's, or an override may not change.
    """
    folder = RunFolder(absolute_path(run_dir, "--resume"))
    folder.require()
    return load_run(folder.config, [*overrides, override("run_dir", str(folder.path))])


def keep_settings(folder: RunFolder, config: RunConfig) -> None:
    """Write the settings that a new run begins with, which a resumed run is compared with."""
    if not folder.settings.exists():
        write_json(folder.settings, kept_settings(config))


def require_same_settings(folder: RunFolder, config: RunConfig) -> None:
    """Raises: ConfigError that names a setting which the run in ``folder`` has otherwise."""
    if not folder.exists or not folder.settings.exists():  # the folder itself compares the fingerprint
        return
    there, here = json.loads(folder.settings.read_text()), kept_settings(config)
    changed = [name for name in here if name in there and here[name] != there[name]]
    if not changed:
        return
    name, others = changed[0], changed[1:]
    also = f" (also changed: {', '.join(others)})" if others else ""
    raise ConfigError(
        name,
        _shown(here[name]),
        f"stay {_shown(there[name])}, as it was when the run in {folder.path} began{also}",
        f"set it back, or choose another run_dir; a resumed run may change only {', '.join(MAY_CHANGE)} and cluster",
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
