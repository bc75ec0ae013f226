"""The runs of a study: their configuration, their folder, and whether they have finished or diverged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.run.settings import load_run
from deploy.study.spec import Settings, StudySpec
from deploy.study.tasks.registry import Task
from distill.config import RunConfig
from distill.config.load import override
from distill.config.tree import fingerprint
from distill.errors import ConfigError, Diverged
from distill.run.folder import RunFolder


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    recipe: str
    seed: int
    tuned: Settings
    """The values of the tuned settings: a point of the grid."""
    tuning: bool
    overrides: tuple[str, ...]
    """All its settings, as overrides of an empty configuration."""
    config: RunConfig
    run_dir: Path

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "summary.json").exists() or self.has_diverged

    @property
    def has_diverged(self) -> bool:
        """Whether the run ended because of numbers that are not finite. That is a result, not a failure."""
        failure = RunFolder(self.run_dir).read_failure()
        return failure is not None and failure["code"] == Diverged.code


@contextlib.contextmanager
def of_recipe(recipe: str) -> Iterator[None]:
    """Name the recipe in errors about its configuration."""
    try:
        yield
    except ConfigError as error:
        raise error.within(f"recipes.{recipe}") from None


@dataclass(frozen=True)
class Jobs:
    """Makes the jobs of one study, in one folder, with one version of the method's code."""

    spec: StudySpec
    task: Task
    folder: Path
    code: str
    """The method's hash."""

    def job(self, recipe: str, seed: int, tuned: Settings, *, tuning: bool) -> Job:
        """Make a job. ``tuned``: values for the settings of the tuning grid.

        Raises: ConfigError for a wrong setting.
        """
        overrides = self._overrides(recipe, seed, tuned, tuning)
        with of_recipe(recipe):
            config = load_run(None, overrides)
        run_dir = self.folder / "runs" / f"{recipe}-{fingerprint(config)}-{self.code}"
        return Job(recipe, seed, tuned, tuning, tuple(overrides), config, run_dir)

    def _overrides(self, recipe: str, seed: int, tuned: Settings, tuning: bool) -> list[str]:
        on_top = dict(self.spec.recipes[recipe])
        on_top.pop("tuned_as", None)
        settings: Settings = {"recipe": on_top.pop("recipe", recipe)} | self.task.settings(tuning)
        settings |= self.spec.settings
        if tuning and self.spec.tuning is not None:
            settings |= self.spec.tuning.settings
        settings |= on_top | tuned | {"seed": seed}
        for name, value in settings.items():
            if isinstance(value, str):
                settings[name] = value.replace("{task}", str(self.task.folder()))
        return [override(name, value) for name, value in settings.items()]
