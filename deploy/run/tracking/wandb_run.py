"""Weights & Biases: a run whose id is that of the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from deploy.run.tracking.tracker import TrackedRun


class WandbRun:
    """Logs rows with their update as the x axis.

    W&B's own step must rise, but evaluations beside the updates come late, and a resumed run repeats updates. Output of
    the terminal, code and the git remote, whose address can contain a password, are not uploaded.
    """

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = import_module("wandb")
        self._warn_level = wandb.AlertLevel.WARN
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        wandb.setup(settings=settings)  # silent before it looks for a key, so that it never prompts
        self._run: Any = wandb.init(
            project=run.project,
            id=run.run_id,
            name=run.name,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.settings),
            allow_val_change=True,  # a resumed run can have other settings
            settings=settings,
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"update": update, **numbers})

    def log_text(self, update: int, name: str, text: str) -> None:
        self._run.alert(title=f"{name} after update {update}", text=text, level=self._warn_level)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
