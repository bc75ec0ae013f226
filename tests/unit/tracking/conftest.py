"""No test of this folder may have the process of all tests end."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def leaving(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each request of a tracker that the process leaves at once."""
    requests: list[str] = []
    ask: Callable[[], None] = lambda: requests.append("at once")  # noqa: E731
    monkeypatch.setattr("deploy.run.tracking.kinds.leave_at_once", ask)
    return requests
