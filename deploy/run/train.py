"""`distill train`: takes a run folder and executes the stages that are not done yet."""

from __future__ import annotations

from typing import Any

from deploy.run.context import run_context
from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.run.progress import Progress
from deploy.run.record import RunRecord
from deploy.run.stages import STAGES
from distill.config import RunConfig
from distill.config.load import load_config
from distill.config.tree import fingerprint, flat_settings, to_yaml
from distill.errors import ConfigError, DistillError
from distill.run.folder import RunFolder


class RunFailed(Exception):
    """A run that ended by ``error`` after it had taken its folder. ``where`` names the file with the traceback."""

    def __init__(self, error: Exception, where: str) -> None:
        message = str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"
        super().__init__(f"the run failed: {message}")
        self.error = error
        self.where = where


def train(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Start or resume the run in ``config.run_dir``; returns its summary.

    Raises: ConfigError before the run folder is taken; RunFailed for every error after that.
    """
    folder = RunFolder(config.run_dir)
    if (summary := _finished(folder, config)) is not None:
        progress.say(f"{folder.path} is finished ({summary['updates']} updates); nothing to do")
        return summary
    _require_same_config(folder, config)
    preflight = Preflight(config)
    for check in preflight.run():
        if check.status == "warn":
            progress.say(f"warning: {check.text}")
        elif check.status == "pass" and check.name in ("student", "data"):
            progress.say(f"{check.name}: {check.text}")
    preflight.require()
    with folder:
        resumes = folder.create(to_yaml(config), fingerprint(config))
        progress.say(f"{'resuming' if resumes else 'new run'} {folder.path}")
        try:
            return _run_stages(config, preflight, folder, progress)
        except Exception as error:
            raise RunFailed(error, _keep_failure(folder, error)) from error


def config_to_resume(run_dir: str) -> RunConfig:
    """Load the configuration that a run folder contains, with ``run_dir`` as the folder's present place.

    Raises: ConfigError when the folder is not a run's.
    """
    folder = RunFolder(run_dir)
    folder.require()
    return load_config(folder.config, [f"run_dir={folder.path}"])


def _run_stages(
    config: RunConfig, preflight: Preflight, folder: RunFolder, progress: Progress
) -> dict[str, Any]:
    inputs = prepare(config, preflight, folder)
    record = RunRecord(config, folder)
    with run_context(config, record, progress) as run:
        for stage in STAGES:
            inputs = stage(run, inputs)
    return record.finish()


def _keep_failure(folder: RunFolder, error: Exception) -> str:
    """Write the error into the folder, as data and with its traceback; returns where that is."""
    try:
        folder.write_failure(error)
    except OSError as unwritten:  # a full disk must not hide the failure behind a second one
        return f"its traceback could not be written to {folder.traceback} ({unwritten})"
    return f"traceback in {folder.traceback}"


def _finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """The summary of the folder's run, if that has ended and has this very configuration."""
    if not folder.exists or folder.fingerprint != fingerprint(config):
        return None
    return folder.read_summary()


def _require_same_config(folder: RunFolder, config: RunConfig) -> None:
    """Raises: ConfigError that names the differing settings, before the costlier checks.

    The folder itself also refuses another configuration.
    """
    if not folder.exists or folder.fingerprint == fingerprint(config):
        return
    there = flat_settings(load_config(folder.config))
    here = flat_settings(config)
    differing = [name for name in here if name != "run_dir" and here[name] != there.get(name)]
    shown = ", ".join(f"{name}={here[name]} (there {there.get(name)})" for name in differing[:3])
    must = f"contain a run of this configuration (it differs in {shown})"
    remedy = "choose another run_dir, or resume that run unchanged with `distill train --resume`"
    raise ConfigError("run_dir", folder.path, must, remedy)
