"""Random interleavings of a whole run, with deaths, checked against the records of :class:`World`."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.replay.builders import Settings
from tests.unit.replay.world import World, students


@st.composite
def runs(draw: st.DrawFn, lock_step: bool = False) -> Settings:
    age = 0 if lock_step else draw(st.integers(0, 3))
    batch = draw(st.integers(1, 4))
    times = draw(st.integers(1, 3))
    student_text, teacher_text = draw(
        st.sampled_from(
            [("every_update", "sampled"), ("every_update", "none"), ("none", "sampled"), ("mixed", "sampled")]
        )
    )
    return Settings(
        num_updates=draw(st.integers(1, 7)),
        prompts_per_update=batch,
        teacher_rows_per_update=draw(st.integers(1, 4)),
        student_text=student_text,
        teacher_text=teacher_text,
        max_policy_age=age,
        max_times_sampled=times,
        samples_per_insert=1
        if age == 0
        else draw(st.sampled_from([1.0, 1.5, 2.0, 3.0]).filter(lambda s: s <= times)),
        min_size_to_sample=draw(st.integers(0, batch * (age + 1))),
        max_bytes=draw(st.sampled_from([1, 200, 1 << 40])),
        num_prompts=draw(st.integers(1, 9)),
        num_teacher_rows=draw(st.integers(1, 9)),
        samples_per_prompt=draw(st.integers(1, 3)),
        num_rollouts=draw(st.integers(1, 3)),
        num_scorers=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=100, deadline=None)
@given(runs(), st.integers(0, 2**32), st.integers(0, 250))
def test_every_interleaving_reaches_the_end_and_keeps_the_ledger(run, seed, num_steps):
    world = World(run, seed)
    for _ in range(num_steps):
        if world.index.finished:
            break
        world.step()
    world.finish()
    used = [number for update in range(run.num_updates) for number in students(world.uses[update])]
    if world.in_order:
        assert used == list(range(run.plan.student_through(run.num_updates)))


def trace(run: Settings, seed: int, deaths: tuple[str, ...]) -> World:
    world = World(run, seed)
    for _ in range(150):
        if not world.index.finished:
            world.step(deaths)
    world.finish()
    return world


@settings(max_examples=40, deadline=None)
@given(runs(lock_step=True), st.integers(0, 2**32), st.integers(0, 2**32))
def test_lock_step_does_not_depend_on_timing(run, seed, other_seed):
    run = Settings(**(vars(run) | {"max_bytes": 1 << 40}))  # eviction depends on the bytes, which are random
    one, other = trace(run, seed, ()), trace(run, other_seed, ())
    assert one.shares == other.shares
    assert sorted(one.jobs) == sorted(other.jobs), "the scoring calls differ"
    assert all(len({table for table, *_ in work}) == 1 for _, work in one.jobs)
    for update in range(run.num_updates):
        assert draws(one, update) == draws(other, update)


@settings(max_examples=40, deadline=None)
@given(runs(lock_step=True), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_resumed_lock_step_run_uses_the_same_draws(run, seed, other_seed):
    one, other = trace(run, seed, ("crash",)), trace(run, other_seed, ())
    for update in range(run.num_updates):
        assert draws(one, update) == draws(other, update)


def draws(world: World, update: int) -> list[str]:
    return [group.draw.draw_id for group in world.uses[update].groups]
