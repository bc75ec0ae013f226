"""Everything on which a run depends fails in one asynchronous run of real Ray actors, and nothing is lost.

`make chaos` is the long form. Each of these ends by killing the driver.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.soak import OF_ACTORS, OF_THE_RUN, Soak
from tests.integration.test_train import PLAIN, world

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_actors_fail_in_every_way(world: Path) -> None:
    """With vLLM's student, whose engine core is a process of its own."""
    Soak(world, "actors", ["scoring.engine=transformers"], seed=0).run(OF_ACTORS)


def test_driver_and_ray_fail_in_every_way(world: Path) -> None:
    Soak(world, "driver-and-ray", PLAIN, seed=0).run(OF_THE_RUN)
