"""The settings of a run: how a command gets them, and what a resumed run may change."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import PRESETS
from deploy.fetch import MODELS
from deploy.job import in_uploaded_folder, require_lasting_path, uploaded_path_or_name
from deploy.paths import absolute_path, path_or_name
from distill.config import RunConfig
from distill.config.load import load_config, override
from distill.config.tree import MAY_CHANGE, flat_settings, kept_settings
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

    So a run can be resumed from another folder. Names of models and data that can be fetched, and hub ids, stay, and so
    do the paths of files that were uploaded with a job.

    Raises: ConfigError in a job, for a relative path of something else.
    """
    in_job = in_uploaded_folder()
    if in_job:
        require_lasting_path(config.run_dir, "run_dir")
    place = uploaded_path_or_name if in_job else path_or_name
    data = replace(config.data, path=place(config.data.path, KNOWN_DATA, "data.path"))
    sections: dict[str, Any] = {"data": data}
    for name in ("teacher", "student", "proxy"):
        section = getattr(config, name)
        if section.model is not None:
            sections[name] = replace(section, model=place(section.model, MODELS, f"{name}.model"))
    return replace(config, run_dir=str(absolute_path(config.run_dir, "run_dir")), **sections)


def config_to_resume(run_dir: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration that a run folder contains, with ``run_dir`` as the folder's present place.

    Raises: ConfigError when the folder is not a run's, and for an override of ``run_dir``.
    """
    if in_uploaded_folder():
        require_lasting_path(run_dir, "--resume")
    folder = RunFolder(absolute_path(run_dir, "--resume"))
    folder.require()
    for text in overrides:
        name, _, value = text.partition("=")
        if name.strip() == "run_dir":
            must = f"be left out, because the run is in {folder.path}"
            raise ConfigError(
                "run_dir", value, must, "leave it out; to move the run, move its folder and resume that"
            )
    return load_run(folder.config, [*overrides, override("run_dir", str(folder.path))])


def keep_settings(folder: RunFolder, config: RunConfig) -> None:
    """Write the settings of this incarnation, with which the next one is compared."""
    write_json(folder.settings, flat_settings(config))


def changes_of(folder: RunFolder, config: RunConfig) -> Iterator[str]:
    """What a resumed run has otherwise than its last incarnation, as lines for the user."""
    for name, old, new in _differences(folder, config):
        if name in MAY_CHANGE:
            schedule = "; from here on, the learning rate is that of the new schedule"
            yield f"{name}={_shown(new)} (it was {_shown(old)}){schedule if name == 'learner.num_updates' else ''}"


def require_same_settings(folder: RunFolder, config: RunConfig) -> None:
    """Raises: ConfigError that names the settings which the run in ``folder`` has otherwise."""
    kept = kept_settings(config)
    changed = [difference for difference in _differences(folder, config) if difference[0] in kept]
    if not changed:
        return
    name, old, new = changed[0]
    also = "".join(f"; {other}={_shown(now)} was {_shown(then)}" for other, then, now in changed[1:])
    back = shlex.join(override(other, then) for other, then, _ in changed)
    raise ConfigError(
        name,
        _shown(new),
        f"stay {_shown(old)}, as it was when the run in {folder.path} began{also}",
        f"choose another run_dir for a new run, or continue that run with `{folder.resume_command} {back}`",
    )


def _differences(folder: RunFolder, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(name, value of the folder's run, value of ``config``) of every setting that differs."""
    if not folder.exists or not folder.settings.exists():  # the folder itself compares the fingerprint
        return []
    there, here = json.loads(folder.settings.read_text()), flat_settings(config)
    return [(name, there[name], here[name]) for name in here if name in there and here[name] != there[name]]


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
