"""The three loops in one process: real replay and segments, fake engines and learner."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from actors.corpus import write_corpus
from distill.algorithm import RunStopped, rollout_loop, score_loop, train_loop
from distill.config import RunConfig, StudentConfig, StudentInitConfig
from distill.data import PromptTable, TextCorpus, read_table
from distill.data.prompts import PROMPT_SCHEMA
from distill.interfaces import Completion, Holder, SampleRequest
from distill.replay.desk import Desk
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.index import ReplayIndex
from distill.replay.segments import SegmentStore
from distill.replay.service import ReplayService
from distill.schema import hidden_rows
from tests.fakes import FakeGenerator, FakeLearner, FakeMilestones, FakePublisher, FakeTeacher, corpus_rows

NUM_PROMPTS, NUM_TEXTS = 10, 8


def make_config(*, max_policy_age: int = 0, num_updates: int = 4, **recipe: object) -> RunConfig:
    config = RunConfig(student=StudentConfig(init=StudentInitConfig(source="teacher", num_layers=1)))
    return replace(
        config,
        recipe=replace(config.recipe, **recipe),
        replay=replace(config.replay, max_policy_age=max_policy_age),
        learner=replace(
            config.learner, num_updates=num_updates, prompts_per_update=3, teacher_rows_per_update=2
        ),
        rollout=replace(config.rollout, max_new_tokens=5),
    )


class World:
    """A run with fakes instead of the engines and the learner."""

    def __init__(self, config: RunConfig, tmp_path: Path, delay_s: float = 0.0) -> None:
        self.config = config
        self.service = ReplayService(self.new_index())
        table = pa.table(
            {
                "prompt_tokens": [[1, i + 2] for i in range(NUM_PROMPTS)],
                "reference_tokens": [None] * NUM_PROMPTS,
                "reference_mask": [None] * NUM_PROMPTS,
                "prompt_text": [str(i) for i in range(NUM_PROMPTS)],
                "reference_text": [None] * NUM_PROMPTS,
                "heldout": [False] * NUM_PROMPTS,
                "data_row": list(range(NUM_PROMPTS)),
            },
            schema=PROMPT_SCHEMA,
        )
        self.prompts = PromptTable(table, samples_per_prompt=2, max_new_tokens=5, seed=config.seed)
        self.corpus = TextCorpus(corpus_rows(NUM_TEXTS))
        self.generator = FakeGenerator(delay_s)
        self.teacher: FakeTeacher | None = FakeTeacher()
        self.milestones = FakeMilestones()
        self.capacity = 1 if config.replay.lock_step else 4
        self.publisher = FakePublisher(self.generator)
        self.stores = {
            name: SegmentStore(
                memory_dir=tmp_path / "memory",
                spill_dir=tmp_path / "spill",
                writer_id=name,
                node="local",
                segment_bytes=4096,
                memory_bytes=1 << 20,
            )
            for name in ("rollout", "teacher", "learner")
        }
        self.learner = FakeLearner(self.stores["learner"])

    def new_index(self) -> ReplayIndex:
        config = self.config
        return ReplayIndex(
            replay=config.replay,
            plan=BatchPlan.of(config),
            student_order=DrawOrder("student_text", NUM_PROMPTS, config.seed),
            teacher_order=DrawOrder("teacher_text", NUM_TEXTS, config.seed),
            num_updates=config.learner.num_updates,
            samples_per_prompt=2,
        )

    def rollout(self) -> Coroutine[None, None, None]:
        desk = Desk(
            self.service,
            Holder("rollout", 0),
            self.stores["rollout"],
            capacity=self.capacity,
            samples_per_draw=2,
        )
        return rollout_loop(
            desk, self.prompts, self.generator, self.stores["rollout"], together=self.config.replay.lock_step
        )

    async def run(self) -> None:
        desk = Desk(self.service, Holder("teacher", 0), self.stores["teacher"], capacity=self.capacity)
        await asyncio.gather(
            self.rollout(),
            score_loop(
                desk, self.corpus, self.teacher, self.stores["teacher"], together=self.config.replay.lock_step
            ),
            train_loop(
                self.service,
                self.learner,
                self.publisher,
                self.milestones,
                updates_done=0,
                num_updates=self.config.learner.num_updates,
                lock_step=self.config.replay.lock_step,
            ),
        )


async def test_every_update_gets_its_groups_once_and_versions_rise(tmp_path: Path) -> None:
    world = World(make_config(), tmp_path)
    await world.run()
    assert len(world.learner.seen) == 4
    used = [draw for draws in world.learner.seen for draw in draws]
    assert len(used) == len(set(used)) == 4 * (3 + 2)
    assert world.milestones.calls == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    # In lock-step version u + 1 samples every student token of update u.
    for update, batches in enumerate(world.learner.rows):
        versions = {
            span["version"]
            for batch in batches
            for row in batch.column("policy_versions").to_pylist()
            for span in row or ()
        }
        assert versions == {update + 1}


async def test_a_row_keeps_its_own_payload(tmp_path: Path) -> None:
    world = World(make_config(), tmp_path)
    await world.run()
    for batches in world.learner.rows:
        for batch in batches:
            for tokens, states in zip(
                batch.column("response_tokens").to_pylist(), hidden_rows(batch), strict=True
            ):
                assert states[:, 0].tolist() == tokens


async def test_lock_step_does_not_depend_on_timing(tmp_path: Path) -> None:
    seen = []
    for number, delay_s in enumerate((0.0, 0.003)):
        world = World(make_config(), tmp_path / str(number), delay_s)
        await world.run()
        seen.append(
            [
                [
                    (batch.column("trajectory_id").to_pylist(), batch.column("response_tokens").to_pylist())
                    for batch in batches
                ]
                for batches in world.learner.rows
            ]
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("max_policy_age", [1, 3])
async def test_age_stays_within_its_bound(tmp_path: Path, max_policy_age: int) -> None:
    world = World(make_config(max_policy_age=max_policy_age, num_updates=8), tmp_path, 0.001)
    await world.run()
    ages = [age for lease in world.milestones.leases for age in lease.policy_ages]
    assert len(ages) == 8 * 3
    assert 0 < max(ages) <= max_policy_age


async def test_text_only_recipe_samples_nothing(tmp_path: Path) -> None:
    config = make_config(student_text="none", loss="forward_kl", teacher_text="reference")
    world = World(config, tmp_path)
    await world.run()
    assert world.generator.num_calls == 0
    assert all(len(draws) == 2 for draws in world.learner.seen)


@pytest.mark.parametrize("student_text", ["every_update", "none"])
async def test_a_recipe_without_payload_gets_the_same_rows(tmp_path: Path, student_text: str) -> None:
    """Samples stay where the rollout actor wrote them; only rows of teacher text are stored again."""
    found = []
    for name in ("scored", "plain"):
        world = World(make_config(student_text=student_text), tmp_path / name)
        world.teacher = FakeTeacher() if name == "scored" else None
        await world.run()
        found.append([batch for batches in world.learner.rows for batch in batches])
    for scored, plain in zip(*found, strict=True):
        assert "teacher_hidden" not in plain.schema.names
        for column in ("trajectory_id", "response_tokens", "behavior_logprobs"):
            assert plain.column(column).equals(scored.column(column))


async def test_a_stopped_replay_ends_training_with_an_error(tmp_path: Path) -> None:
    world = World(make_config(num_updates=1000), tmp_path, 0.001)
    running = asyncio.create_task(world.run())
    await asyncio.sleep(0.05)
    await world.service.stop()
    with pytest.raises(
        RunStopped, match=r"^updates done when the replay stopped=\d+ must be 1000; resume the run$"
    ):
        await running


async def test_a_failing_generator_ends_the_loop(tmp_path: Path) -> None:
    world = World(make_config(), tmp_path)

    async def fail(requests: object) -> list:
        raise RuntimeError("engine is gone")

    world.generator.generate = fail  # type: ignore[method-assign]
    running = asyncio.create_task(world.rollout())
    await world.service.advance(0, 1)
    with pytest.raises(ExceptionGroup) as failure:
        await asyncio.wait_for(running, 5)
    assert "engine is gone" in str(failure.value.exceptions[0])


async def test_a_corpus_keeps_the_samples_of_a_prompt_together(tmp_path: Path) -> None:
    world = World(make_config(), tmp_path)  # two samples a prompt
    done: list[int] = []
    path = tmp_path / "corpus.parquet"
    await write_corpus(
        world.prompts,
        5,
        world.generator,
        path,
        rows_per_call=4,
        progress=lambda rows, tokens: done.append(rows),
    )
    table = read_table(path)
    assert table["prompt_index"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert table["sample_index"].to_pylist() == [0, 1] * 5
    assert len(set(table["trajectory_id"].to_pylist())) == 10
    assert done == [4, 8, 10]
    prompts = table["prompt_tokens"].to_pylist()
    assert prompts == [[1, i + 2] for i in range(5) for _ in range(2)]
    whole = tmp_path / "whole.parquet"
    await write_corpus(world.prompts, 5, world.generator, whole, rows_per_call=100, progress=lambda *_: None)
    assert read_table(whole).equals(table), "the size of a call must not change the text"
    assert TextCorpus(table).num_rows == 10
    assert sorted(file.name for file in tmp_path.glob("*.par*")) == ["corpus.parquet", "whole.parquet"]


async def test_an_interrupted_corpus_continues_where_it_was(tmp_path: Path) -> None:
    world = World(make_config(), tmp_path)
    generate, calls = world.generator.generate, 0

    async def interrupted(requests: Sequence[SampleRequest]) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return await generate(requests)

    async def write(path: Path) -> None:
        await write_corpus(world.prompts, 5, world.generator, path, rows_per_call=4, progress=lambda *_: None)

    world.generator.generate = interrupted  # type: ignore[method-assign]
    path = tmp_path / "corpus.parquet"
    with pytest.raises(KeyboardInterrupt):
        await write(path)
    assert not path.exists()
    await write(path)
    assert calls == 4, "the first two calls must not be made again"
    world.generator.generate = generate  # type: ignore[method-assign]
    await write(tmp_path / "whole.parquet")
    assert read_table(path).equals(read_table(tmp_path / "whole.parquet"))
