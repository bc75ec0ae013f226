"""Requests to scale a run that trains."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deploy.run.training import scale
from distill.config import RunConfig
from distill.room import NoSpace
from distill.run.folder import RunFolder


async def test_an_answer_for_which_the_disk_has_no_room_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise NoSpace("free space", "1 byte", "be enough")

    monkeypatch.setattr(scale, "POLL_S", 0.01)
    monkeypatch.setattr(scale, "write_json", full)
    folder, said = RunFolder(tmp_path), []
    crew: Any = None  # in lock-step, a request is refused before the crew acts
    answering = asyncio.create_task(scale.answer_requests(RunConfig(), folder, crew, said.append))
    await asyncio.sleep(0.02)
    for number in range(2):
        folder.scale_request.write_text(json.dumps({"name": str(number), "wanted": {"scoring": 2}}))
        async with asyncio.timeout(5):
            while len(said) <= number:
                await asyncio.sleep(0.01)
    assert not answering.done() and all("replay.max_policy_age=0 must be >= 1" in line for line in said)
    answering.cancel()
