"""The studies that ship: each of their runs has a valid configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import PRESETS
from deploy.study.jobs import Jobs
from deploy.study.spec import load_study
from deploy.study.tasks.registry import known_task


@pytest.mark.parametrize("study", sorted((PRESETS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_study_can_be_configured(study: Path, tmp_path: Path):
    spec = load_study(study)
    jobs = Jobs(spec, known_task(spec.task), tmp_path, "code")
    points = list(spec.tuning.points()) if spec.tuning is not None else [{}]
    for recipe in spec.recipes:
        jobs.job(recipe, spec.seeds[0], points[0], tuning=False)
        for point in points:
            jobs.job(recipe, spec.seeds[0], point, tuning=True)
