"""`distill train`: takes a run folder and executes the stages that are not done yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.run.cache import remove_unfinished
from deploy.run.context import run_context
from deploy.run.inputs_record import (
    InputsRecord,
    Parts,
    differences,
    input_parts,
    keep_corpora,
    teacher_fingerprint,
    version_changes,
)
from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.run.progress import Progress
from deploy.run.record import RunRecord, remove_results
from deploy.run.settings import (
    SettingChange,
    changed_settings,
    changes_of,
    keep_settings,
    last_fingerprint,
    require_same_run,
)
from deploy.run.stages import STAGES
from deploy.version import recorded_versions
from distill.config import RunConfig
from distill.config.tree import resume_fingerprint, to_yaml
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
    changed = changed_settings(folder, config)
    if not changed and (summary := _finished(folder, config)) is not None:
        progress.say(f"{folder.path} is finished ({summary['updates']} updates); nothing to do")
        return summary
    record = InputsRecord.read(folder) if folder.exists else None
    inputs = _same_inputs(folder, config, changed, record)
    preflight = Preflight(config)
    for check in preflight.run():
        if check.status == "warn":
            progress.say(f"warning: {check.text}")
        elif check.status == "pass" and check.name in ("student", "data"):
            progress.say(f"{check.name}: {check.text}")
    preflight.require()
    inputs = inputs or input_parts(config)
    with folder:
        last = last_fingerprint(folder, config) if record is not None else None
        resumes = folder.create(to_yaml(config), resume_fingerprint(config), last)
        progress.say(f"{'resuming' if resumes else 'new run'} {folder.path}")
        for line in (*changes_of(folder, config), *_notes(folder, record)):
            progress.say(line)
        keep_settings(folder, config)
        corpora = record.corpora if record is not None else {}
        InputsRecord(inputs=inputs, corpora=corpora, versions=recorded_versions()).write(folder)
        try:
            if config.learner.num_updates > _updates_made(folder):
                remove_results(folder)
            return _run_stages(config, preflight, folder, progress, teacher_fingerprint(inputs))
        except Exception as error:
            raise RunFailed(error, _keep_failure(folder, error)) from error


def _same_inputs(
    folder: RunFolder, config: RunConfig, changed: list[SettingChange], record: InputsRecord | None
) -> Parts | None:
    """Compare the run with what it began with; returns the parts of its inputs, or None without a record of them.

    ``changed``: the settings that must stay and differ.

    Raises: ConfigError that names everything that differs.
    """
    if record is None:
        require_same_run(folder, config, changed, [])
        return None
    try:
        inputs = input_parts(config)
    except ConfigError:
        require_same_run(folder, config, changed, [])  # other settings can be why an input is not found
        raise
    require_same_run(folder, config, changed, differences(record.inputs, inputs))
    return inputs


def _notes(folder: RunFolder, record: InputsRecord | None) -> Iterator[str]:
    """What the user of a resumed run should know of its folder and its software, as lines. The folder is open."""
    if folder.found_copy_of is not None:
        yield f"this folder is a copy of that of run {folder.found_copy_of}; it continues as run {folder.run_id}"
    if record is not None and (changes := version_changes(record)):
        yield f"warning: this run continues with other versions, with which numbers can differ: {changes}"
    if record is None and folder.has_prompts:
        yield (
            f"warning: the run has no {folder.inputs.name}, so a change of its data or models since it began is not "
            "noticed; what is there now is recorded"
        )


def _run_stages(
    config: RunConfig, preflight: Preflight, folder: RunFolder, progress: Progress, teacher: str
) -> dict[str, Any]:
    remove_unfinished()
    inputs = prepare(config, preflight, folder, teacher)
    keep_corpora(folder, config, inputs)
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
    """The summary of the folder's run, if that has ended and the configuration has no more updates.

    Raises: ConfigError when it has made more updates than the configuration has, or as many without having ended.
    """
    summary = folder.read_summary() if folder.exists else None
    made, wanted = _updates_made(folder), config.learner.num_updates
    has_ended = summary is not None or folder.evaluation("after").exists()
    fewest = made if has_ended else made + 1
    if made and wanted < fewest:
        must = f"be >= {fewest}, because the run in {folder.path} has made {made} updates"
        raise ConfigError("learner.num_updates", wanted, must, "raise it, or choose another run_dir")
    return summary if wanted == made else None


def _updates_made(folder: RunFolder) -> int:
    """Updates that a run has in its newest checkpoint, or in its summary if the checkpoints have been deleted."""
    summary = folder.read_summary()
    return max([*folder.steps, summary["updates"] if summary is not None else 0])
