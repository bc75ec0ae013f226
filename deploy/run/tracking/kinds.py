"""The trackers that can be chosen: the package that each needs, and how it is opened. Imports no tracker's package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from deploy.exits import leave_at_once
from deploy.run.tracking.mlflow_run import MlflowRun
from deploy.run.tracking.tensorboard_files import TensorBoardFiles
from deploy.run.tracking.tracker import TrackedRun, Tracker
from deploy.run.tracking.trackers import Trackers
from deploy.run.tracking.trackio_run import TrackioRun
from deploy.run.tracking.wandb_run import WandbRun
from distill.config import RunConfig
from distill.config.tree import flat_settings
from distill.errors import ConfigError
from distill.redaction import redacted
from distill.run.folder import RunFolder
from distill.run.metrics import EventLog


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that can be chosen."""

    package: str
    """The package that is imported; `pip install` has it under the same name."""
    open: Callable[[TrackedRun], Tracker]


KINDS = {
    "tensorboard": TrackerKind("tensorboardX", TensorBoardFiles),
    "wandb": TrackerKind("wandb", WandbRun),
    "mlflow": TrackerKind("mlflow", MlflowRun),
    "trackio": TrackerKind("trackio", TrackioRun),
}


def require_installed(config: RunConfig) -> None:
    """Raises: ConfigError when the package of a tracker is not installed."""
    for name in config.tracking.to:
        package = KINDS[name].package
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B's own, is not a package
            remedy = f"run `pip install {package}`, or take {name} out of the list"
            raise ConfigError("tracking.to", name, f"be installed (there is no package {package})", remedy)


def start_trackers(
    config: RunConfig, folder: RunFolder, updates_done: int, say: Callable[[str], None]
) -> Trackers:
    """Start the configured trackers of the run in ``folder``, which is open. ``say``: prints a line that stays."""
    run = TrackedRun(
        run_id=folder.run_id,
        name=f"{config.recipe.name}-{folder.run_id}",
        project=config.tracking.project,
        folder=folder.path,
        incarnation=folder.incarnation,
        updates_done=updates_done,
        settings={
            name: redacted(value) if isinstance(value, str) else value
            for name, value in flat_settings(config).items()
        },
    )
    openers = {name: partial(KINDS[name].open, run) for name in config.tracking.to}
    return Trackers(openers, say, EventLog(folder.path), leave_at_once=leave_at_once)
