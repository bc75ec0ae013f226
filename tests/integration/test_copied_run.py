"""A copy of a run folder continues beside the original, with real Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.test_train import PLAIN, assert_nothing_shared, assert_same_numbers, start, train
from tests.tiny import make_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_copied_run_continues_beside_the_original(tmp_path: Path) -> None:
    """Both get the same numbers, because none depends on the run id, and the ledgers of both add up."""
    make_world(tmp_path)
    runs = [train(tmp_path, "copied", *PLAIN), tmp_path / "copy"]
    shutil.copytree(*runs)
    resumed = [start(tmp_path, "train", "--resume", str(run), "learner.num_updates=4") for run in runs]
    for process in resumed:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-3000:]
    identities = [json.loads((run / "run.json").read_text()) for run in runs]
    assert identities[0]["run_id"] == identities[1]["copied_from"] != identities[1]["run_id"]
    assert_same_numbers(*runs)
    for run in runs:
        assert_nothing_shared(run)
        audited = start(tmp_path, "audit", str(run))
        output, _ = audited.communicate(timeout=100)
        assert audited.returncode == 0, output[-3000:]
