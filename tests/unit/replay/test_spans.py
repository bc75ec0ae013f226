"""The spans of work: one for each piece that an actor got, whatever is lost, repeated or late."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.interfaces import Exchange, Holder, SampleRef
from distill.replay.service import ReplayService
from distill.replay.spans import FIELDS, NONE, TABLES, SpanBuffer, SpanKind, SpanOutcome, WorkSpans
from tests.unit.replay.builders import ROLLOUT, TEACHER, Settings, fill, sample, scored
from tests.unit.replay.test_races import Run, Wire, check, settings_of

OTHER = Holder("teacher", 1)


def rows(drained: dict[str, Any]) -> list[dict[str, Any]]:
    """The spans by name of field, with the names of lanes, tables, kinds and outcomes."""
    values = array("q")
    values.frombytes(drained["values"])
    found: list[dict[str, Any]] = []
    for place in range(0, len(values), len(FIELDS)):
        row: dict[str, Any] = dict(zip(FIELDS, values[place : place + len(FIELDS)], strict=True))
        row |= {"lane": drained["lanes"][row["lane"]], "table": TABLES[row["table"]]}
        found.append(row | {"kind": SpanKind(row["kind"]), "outcome": SpanOutcome(row["outcome"])})
    return found


class Ticks:
    """A clock whose calls are a millisecond apart."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1_000_000
        return self.now


def make(capacity: int = 1000, **values: object) -> ReplayService:
    chosen = Settings(**values)
    return ReplayService(chosen.index(), WorkSpans(chosen.samples_per_prompt, Ticks(), capacity))


async def spans_of(replay: ReplayService) -> list[dict[str, Any]]:
    return rows(await replay.spans())


async def test_a_draw_has_a_span_at_each_actor_and_ends_in_its_lease() -> None:
    replay = make(num_updates=1, prompts_per_update=1, teacher_rows_per_update=0, teacher_text="none")
    await replay.advance(0, 1)
    [draw] = (await replay.exchange(ROLLOUT, [], [], 1)).work  # at 1 ms
    await replay.exchange(ROLLOUT, [sample(draw, 1)], [], 0)  # at 2 ms
    [stored] = (await replay.exchange(TEACHER, [], [], 1)).work  # at 3 ms
    await replay.exchange(TEACHER, [scored(stored)], [], 0)  # at 4 ms
    assert await replay.lease(0) is not None  # at 5 ms
    await replay.acknowledge(0)  # at 6 ms
    found = await spans_of(replay)
    assert [
        (row["kind"].name, row["lane"], row["start_ns"] // 1_000_000, row["end_ns"] // 1_000_000)
        for row in found
    ] == [
        ("ROLLOUT", "rollout-0.0", 1, 2),
        ("SCORING", "teacher-0.0", 3, 4),
        ("READY", "replay", 4, 5),
        ("LEASE", "replay", 5, 6),
    ]
    assert {(row["draw"], row["table"]) for row in found[:3]} == {(draw.number, "student_text")}
    assert [row["update"] for row in found] == [NONE, NONE, 1, 1]
    assert {(row["tokens"], row["outcome"]) for row in found} == {(9, SpanOutcome.DONE)}
    assert [row["version"] for row in found] == [1, 1, 1, NONE]
    assert await spans_of(replay) == [], "the spans are returned once"


async def test_a_delivery_that_is_repeated_has_no_second_span() -> None:
    replay = make(num_updates=1, samples_per_prompt=2)
    await replay.advance(0, 1)
    draws = (await replay.exchange(ROLLOUT, [], [], 8)).work
    first = [sample(draw, 1) for draw in draws]
    for _ in range(3):
        await replay.exchange(ROLLOUT, first, [draw.work_id for draw in draws], 0)
    await replay.exchange(ROLLOUT, [sample(draw, 1, number=1) for draw in draws], [], 0)
    await replay.exchange(ROLLOUT, first, [], 0)
    found = await spans_of(replay)
    assert Counter((row["draw"], row["sample"]) for row in found) == Counter(
        (draw.number, number) for draw in draws for number in (0, 1)
    )


async def test_work_that_is_given_again_after_a_lost_answer_has_one_span() -> None:
    replay = make(num_updates=1, prompts_per_update=1)
    await replay.advance(0, 1)
    [draw] = (await replay.exchange(ROLLOUT, [], [], 1)).work
    assert (await replay.exchange(ROLLOUT, [], [], 1)).work == (draw,), "the first answer was lost"
    await replay.exchange(ROLLOUT, [sample(draw, 1)], [], 0)
    [row] = await spans_of(replay)
    assert (row["start_ns"], row["outcome"]) == (1_000_000, SpanOutcome.DONE), (
        "from the time of the first answer"
    )


async def test_the_spans_of_a_dead_actor_are_lost_and_its_work_has_new_ones() -> None:
    replay = make(num_updates=1, teacher_rows_per_update=2, student_text="none")
    await replay.advance(0, 1)
    held = (await replay.exchange(TEACHER, [], [], 2)).work
    await replay.exchange(TEACHER, [scored(held[0])], [held[1].work_id], 0)
    await replay.forget(TEACHER)
    await replay.exchange(TEACHER, [scored(held[1])], [], 0)  # late
    [again] = (await replay.exchange(OTHER, [], [], 2)).work
    await replay.exchange(OTHER, [scored(again)], [], 0)
    found = [(row["lane"], row["draw"], row["issue"], row["outcome"].name) for row in await spans_of(replay)]
    one, two = held[0].number, held[1].number
    assert found == [
        ("teacher-0.0", one, 0, "DONE"),
        ("teacher-0.0", two, 0, "LOST"),
        ("teacher-1.0", two, 1, "DONE"),
    ]


async def test_a_sample_of_a_dead_rollout_actor_is_refused_to_its_teacher_actor() -> None:
    replay = make(num_updates=1, samples_per_prompt=2, prompts_per_update=1, teacher_text="none")
    await replay.advance(0, 1)
    [draw] = (await replay.exchange(ROLLOUT, [], [], 1)).work
    await replay.exchange(ROLLOUT, [sample(draw, 1)], [draw.work_id], 0)
    [stored] = (await replay.exchange(TEACHER, [], [], 1)).work
    await replay.forget(ROLLOUT)
    await replay.exchange(TEACHER, [scored(stored)], [], 0)
    assert [(row["kind"].name, row["sample"], row["outcome"].name) for row in await spans_of(replay)] == [
        ("ROLLOUT", 0, "DONE"),
        ("ROLLOUT", 1, "LOST"),
        ("SCORING", 0, "REFUSED"),
    ]


async def test_a_lease_that_a_learner_never_acknowledged_is_lost() -> None:
    replay = make(num_updates=3, max_policy_age=2)
    await replay.advance(0, 1)
    fill(replay.index)
    await replay.lease(0)
    await replay.lease(0)  # the first answer was lost
    await replay.acknowledge(0)
    await replay.acknowledge(0)
    await replay.lease(1)
    await replay.lease(0)  # the learner went back to its checkpoint
    await replay.acknowledge(0)
    leases = [row for row in await spans_of(replay) if row["kind"] is SpanKind.LEASE]
    assert [(row["update"], row["outcome"].name) for row in leases] == [(1, "DONE"), (2, "LOST"), (1, "DONE")]


async def test_an_index_that_is_loaded_again_forgets_who_holds_what() -> None:
    replay = make(num_updates=1, max_policy_age=0)
    state = await replay.state()
    await replay.advance(0, 1)
    work = (await replay.exchange(ROLLOUT, [], [], 8)).work
    assert await replay.go_back(state)
    found = await spans_of(replay)
    assert [row["draw"] for row in found] == [draw.number for draw in work]
    assert {row["outcome"] for row in found} == {SpanOutcome.LOST}


async def test_spans_beyond_the_capacity_are_counted_and_dropped() -> None:
    replay = make(capacity=1, num_updates=1)
    await replay.advance(0, 1)
    draws = (await replay.exchange(ROLLOUT, [], [], 8)).work
    assert len(draws) == 2
    await replay.exchange(ROLLOUT, [sample(draw, 1) for draw in draws], [], 0)
    drained = await replay.spans()
    assert (len(rows(drained)), drained["num_dropped"]) == (1, 1)
    assert (await replay.spans())["num_dropped"] == 0, "they are counted once"


def test_a_buffer_keeps_no_more_than_its_capacity() -> None:
    buffer = SpanBuffer(capacity=10)
    for _ in range(1000):
        buffer.add((0, buffer.lane("x"), 0, 1, 0, 0, 1, 2, 3, 4, 5, 0))
    drained = buffer.drain()
    assert len(drained["values"]) == 10 * len(FIELDS) * 8
    assert drained["num_dropped"] == 990


class Witness(Wire):
    """Remembers what was delivered and what was accepted, without the help of the spans."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.service, run.wire.luck, run.wire.faults)
        self.delivered: set[tuple[str, str]] = set()
        self.accepted: set[tuple[str, str]] = set()
        self._exchange = run.service.exchange
        run.service.exchange = self._note  # type: ignore[method-assign]

    async def _note(
        self, holder: Holder, done: Sequence[SampleRef], holding: Sequence[str], room: int
    ) -> Exchange:
        self.delivered |= {(str(holder), each.work_id) for each in done}
        answer = await self._exchange(holder, done, holding, room)
        self.accepted |= {(str(holder), each.work_id) for each in done if each.work_id not in answer.refused}
        return answer


def piece(row: dict[str, Any], epoch: Callable[[str, int], int]) -> tuple[str, str]:
    """The actor of a span, and the ``work_id`` of what it delivered."""
    number = row["draw"]
    return row[
        "lane"
    ], f"{row['table']}-{epoch(row['table'], number)}-{number}.{row['issue']}/{row['sample']}"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.2]), st.integers(0, 3))
def test_every_delivered_piece_has_one_span_in_every_interleaving(
    seed: int, faults: float, deaths: int
) -> None:
    chosen = settings_of(random.Random(seed))

    async def whole() -> tuple[Run, Witness, list[dict[str, Any]]]:
        run = Run(chosen, seed, faults=faults, deaths=deaths)
        run.service = ReplayService(run.service.index, WorkSpans(chosen.samples_per_prompt, Ticks()))
        run.wire = witness = Witness(run)
        try:
            await run.main()
            check(run)
        finally:
            for task in run.actors.values():
                task.cancel()
        return run, witness, await spans_of(run.service)

    run, witness, found = asyncio.run(whole())
    rows_in_table = {"student_text": chosen.num_prompts, "teacher_text": chosen.num_teacher_rows}
    work = [row for row in found if row["kind"] in (SpanKind.ROLLOUT, SpanKind.SCORING)]
    pieces = Counter(piece(row, lambda table, number: number // rows_in_table[table]) for row in work)
    assert max(pieces.values()) == 1, "a piece has two spans"
    done = {
        piece(row, lambda table, number: number // rows_in_table[table])
        for row in work
        if row["outcome"] is SpanOutcome.DONE
    }
    assert witness.accepted <= done <= witness.delivered
    assert all(row["start_ns"] <= row["end_ns"] for row in found)
    ends = [row["end_ns"] for row in found]
    assert ends == sorted(ends)
    acknowledged = {
        row["update"] - 1
        for row in found
        if (row["kind"], row["outcome"]) == (SpanKind.LEASE, SpanOutcome.DONE)
    }
    assert acknowledged == {lease.update for lease in run.leases}
    ready = {(row["update"] - 1, row["table"], row["draw"]) for row in found if row["kind"] is SpanKind.READY}
    assert {
        (lease.update, group.draw.table, group.draw.number) for lease in run.leases for group in lease.groups
    } <= ready
