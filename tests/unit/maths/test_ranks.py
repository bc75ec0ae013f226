"""An update dealt out to two ranks is the update: gloo processes against one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distill.config import MethodConfig
from distill.errors import Diverged
from learner.ranks import ALONE, Ranks
from learner.update.update import update
from tests.unit.maths import methods
from tests.unit.maths.batches import TinyStudent, batch_of, critic_pair, teacher_head

NUM_RANKS = 2
EVEN = ({0, -1}, {1, -2})
LOPSIDED = ({0, 1, -1}, {-2})
"""Groups of each rank; −1 and −2 are halves of the other text. One rank without student text."""
LEARNER = methods.LEARNER
SHORT_STEPS = replace(methods.METHODS["ammd"], critic=replace(methods.CRITIC, positions_per_step=1))
CLIPPED = replace(
    methods.METHODS["ammd_paper"],
    learner=replace(LEARNER, max_grad_norm=1e-3, keep_activations=True),
    critic=replace(methods.CRITIC, max_grad_norm=1e-3),
)
CASES = {
    "clipped, kept activations": (CLIPPED, EVEN, False),
    "slices that one rank has no token of": (SHORT_STEPS, EVEN, False),
    "running mean of the critics": (methods.METHODS["ema"], EVEN, False),
    **{
        f"{name}, even": (methods.METHODS[name], EVEN, False)
        for name in ("ammd", "gkd", "sft", "exact", "minillm", "blackbox")
    },
    **{
        f"{name}, lopsided": (methods.METHODS[name], LOPSIDED, False)
        for name in ("ammd_paper", "dense", "exact")
    },
    "warm-up": (methods.METHODS["ammd"], EVEN, True),
}


def rows_of(settings: MethodConfig, groups: set[int]) -> list[Any]:
    rows, other = [], 0
    for row in methods.rows_for(settings.recipe):
        group = row.group if row.is_student_text else -1 - other % 2
        other += not row.is_student_text
        if group in groups:
            rows.append(row)
    return rows


def one_update(
    settings: MethodConfig, rows: Sequence[Any], ranks: Ranks, *, warmup: bool = False
) -> dict[str, Any]:
    student, critics = TinyStudent(), critic_pair(settings.critic, shake=0.1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(
        student, optimizer, batch_of(rows), teacher_head(), critics, settings, update_number=1,
        warmup=warmup, ranks=ranks,
    )  # fmt: skip
    tensors = dict(student.named_parameters()) | critics.state_dict()
    return {"metrics": metrics, "tensors": {key: value.detach() for key, value in tensors.items()}}


def failed_stage(rank: int, spoilt: str, ranks: Ranks) -> str:
    """The stage in which an update fails that has a number of rank 1 which is not finite."""
    settings, student = methods.METHODS["ammd" if spoilt == "critics" else "anchor_only"], TinyStudent()
    rows = rows_of(settings, EVEN[rank])
    if rank == 1 and spoilt == "scores":
        rows[0].hidden[-1, 2] = torch.inf
    elif rank == 1:
        with torch.no_grad():
            student.embedding[:] = torch.nan
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    before = student.head_weight.detach().clone()
    try:
        update(
            student, optimizer, batch_of(rows), teacher_head(), critic_pair(settings.critic), settings,
            update_number=1, ranks=ranks,
        )  # fmt: skip
    except Diverged as error:
        assert torch.equal(student.head_weight, before)
        return error.stage
    return "none"


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork of a process that had worker threads must not ask for them
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ranks = Ranks(dist.group.WORLD)
    found = {}
    for case, (settings, deal, warmup) in CASES.items():
        found[case] = one_update(settings, rows_of(settings, deal[rank]), ranks, warmup=warmup)
    found["failed"] = {each: failed_stage(rank, each, ranks) for each in ("scores", "critics", "student")}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    # Forked: a spawned process would import everything again, which takes longer than all cases.
    mp.start_processes(_rank, (str(folder),), NUM_RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_how_groups_are_dealt_out_does_not_matter(of_ranks, case):
    settings, _, warmup = CASES[case]
    alone = one_update(settings, rows_of(settings, {0, 1, -1, -2}), ALONE, warmup=warmup)
    for found in of_ranks:
        torch.testing.assert_close(found[case]["metrics"], alone["metrics"], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found[case]["tensors"], alone["tensors"], atol=1e-9, rtol=1e-9)


def test_all_ranks_fail_where_one_does(of_ranks):
    """Otherwise one takes a step that the others do not, or waits for them for ever."""
    for found in of_ranks:
        assert found["failed"] == {"scores": "scores", "critics": "critics", "student": "student"}
