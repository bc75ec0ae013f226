"""The settings of a run: how a command gets them, and what a resumed run may change."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import PRESETS
from deploy.fetch import MODELS
from deploy.job import in_uploaded_folder, require_lasting_path, uploaded_path_or_name
from deploy.paths import absolute_path, path_or_name
from deploy.run.inputs_record import Difference, InputPart
from distill.config import RunConfig
from distill.config.load import load_config, override
from distill.config.tree import (
    MAY_CHANGE,
    PLACES,
    flat_settings,
    kept_settings,
    resume_fingerprint,
    with_settings,
)
from distill.data import KNOWN_DATA
from distill.errors import ConfigError
from distill.files import write_json
from distill.run.folder import RunFolder
from distill.run.json_object import read_object

SettingChange = tuple[str, Any, Any]
"""Name, value of the folder's run and value that is wanted now."""


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
        elif name in PLACES:
            yield f"{name}={_shown(new)} (it was {_shown(old)}), with the same content"


def last_fingerprint(folder: RunFolder, config: RunConfig) -> str:
    """The fingerprint of ``config`` with the places of data and models that the last incarnation had."""
    places = {name: old for name, old, _ in _differences(folder, config) if name in PLACES}
    return resume_fingerprint(with_settings(config, places))


def changed_settings(folder: RunFolder, config: RunConfig) -> list[SettingChange]:
    """The settings that the run in ``folder`` has otherwise and that must stay.

    The places of data and models may change if there is a record of their content, which is compared instead.
    """
    kept = kept_settings(config)
    may_move = folder.inputs.exists()
    return [
        change
        for change in _differences(folder, config)
        if change[0] in kept and not (may_move and change[0] in PLACES)
    ]


def require_same_run(
    folder: RunFolder, config: RunConfig, settings: Sequence[SettingChange], inputs: Sequence[Difference]
) -> None:
    """Raises: ConfigError that names each of the settings and inputs which the run in ``folder`` had otherwise."""
    changes = [(name, _shown(now), _shown(then)) for name, then, now in settings]
    changes += [(name, str(now or "missing"), str(then or "missing")) for name, then, now in inputs]
    if not changes:
        return
    name, now, then = changes[0]
    also = "".join(f"; {other}={new} was {old}" for other, new, old in changes[1:])
    back = {other: override(other, before) for other, before, _ in settings}
    restored: dict[str, None] = {}  # a set in order
    moved = {other: override(other, before) for other, before, _ in _differences(folder, config)}
    for part, old, new in inputs:
        setting = part.partition(" ")[0]
        revision = f"{setting.partition('.')[0]}.revision"
        if setting in moved or revision in moved:
            back |= {other: moved[other] for other in (setting, revision) if other in moved}
        elif (commit := _commit(old)) is not None and commit != _commit(new):
            back[revision] = override(revision, commit)
        else:
            restored[part] = None
    must = f"stay {then}, as it was when the run in {folder.path} began{also}"
    command = " ".join([folder.resume_command, *map(shlex.quote, back.values())])
    if restored:
        remedy = f"choose another run_dir for a new run, or bring back the content of {', '.join(restored)} and continue that run with `{command}`"
    else:
        remedy = f"choose another run_dir for a new run, or continue that run with `{command}`"
    raise ConfigError(name, now, must, remedy)


def _commit(part: InputPart | None) -> str | None:
    """The commit of a part of a model from the hub, whose cache has it in ``snapshots/COMMIT``."""
    folder = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", part.place if part is not None else "")
    return folder[1] if folder else None


def _differences(folder: RunFolder, config: RunConfig) -> list[SettingChange]:
    """Every setting that differs."""
    if not folder.exists or not folder.settings.exists():  # the folder itself compares the fingerprint
        return []
    there = read_object("settings", folder.settings, (), "bring it back from a copy")
    here = flat_settings(config)
    return [(name, there[name], here[name]) for name in here if name in there and here[name] != there[name]]


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
