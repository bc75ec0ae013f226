"""What the learner tells an update: its learning rate, and whose turn it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.config import RunConfig
from distill.config.load import load_config
from learner import distiller
from learner.distiller import Distiller
from learner.model.student import Student
from tests.tiny import make_world, tiny_config, tiny_overrides
from tests.unit.maths.batches import batch_of, random_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    make_world(world)
    return world


def turns(world: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[tuple[bool, float]]:
    """(warmup, learning rate) of each of ten updates."""
    empty = world / "empty.yaml"
    empty.write_text("{}\n")
    settings = [*tiny_overrides(world), "learner.num_updates=10", "learner.learning_rate=1.0",
                "learner.warmup_fraction=0.25", "learner.final_fraction=0.0", *overrides]  # fmt: skip
    config: RunConfig = load_config(empty, settings, Path(distiller.__file__).parents[1] / "deploy/configs")
    found: list[tuple[bool, float]] = []

    def record(student, optimizer: torch.optim.Optimizer, *args, warmup: bool, **rest):
        found.append((warmup, optimizer.param_groups[0]["lr"]))
        return {}

    monkeypatch.setattr(distiller, "update", record)
    monkeypatch.setattr(distiller, "token_batch", lambda batches, size: batch_of(random_rows()))
    learner = Distiller(config, Student(config.teacher.model), config.teacher.model)
    for _ in range(10):
        learner.update([])
    return found


def test_the_students_rate_starts_after_the_critics_warm_up(world, monkeypatch):
    found = turns(world, monkeypatch, "recipe=ammd", "critic.warmup_updates=2")
    assert [warmup for warmup, _ in found] == [True] * 2 + [False] * 8
    rates = [rate for _, rate in found[2:]]
    assert rates[:2] == pytest.approx([0.5, 1.0])  # a quarter of its own eight updates rises
    assert rates == [*rates[:2], *sorted(rates[2:], reverse=True)]
    assert rates[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("recipe", ["fkl", "sft", "anchor_only", "oracle_tv"])
def test_there_is_no_warm_up_without_learned_critics(world, monkeypatch, recipe):
    plain = turns(world, monkeypatch, f"recipe={recipe}")
    assert turns(world, monkeypatch, f"recipe={recipe}", "critic.warmup_updates=4") == plain
    assert not any(warmup for warmup, _ in plain)


@pytest.mark.parametrize(
    ("recipe", "learned"),
    [("ammd", True), ("ammd_paper", True), ("ammd_blackbox", True), ("random_critic", True),
     ("sft", False), ("anchor_only", False), ("opd", False), ("minillm", False), ("jsd", False), ("oracle_skl", False)],
)  # fmt: skip
def test_critics_exist_only_where_their_gaps_have_weight(world, recipe, learned):
    config = tiny_config(world, f"recipe={recipe}", "rollout.samples_per_prompt=2")
    learner = Distiller(config, Student(config.teacher.model), config.teacher.model)
    assert (learner.critics is not None) is learned


def test_a_checkpoint_is_a_copy_that_a_later_update_leaves_alone(world):
    """Otherwise a checkpoint that is written during an update has a valid checksum and torn tensors."""
    config = tiny_config(world, "recipe=ammd", "rollout.samples_per_prompt=2")
    learner = Distiller(config, Student(config.teacher.model, device="cpu"), config.teacher.model)
    assert learner.critics is not None
    modules = [learner.student.model, *learner.critics._critics.values()]
    optimizers = [learner.optimizer, learner.critics.optimizer]
    step(modules, optimizers, 1.0)
    tensors = learner.tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    step(modules, optimizers, 2.0)
    assert {name for name in tensors if "step" in name and tensors[name] == 1}
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    after = learner.tensors()
    assert {name for name in before if torch.equal(after[name], before[name])} == {
        name for name in before if name.startswith("critic_mean")
    }


def step(modules: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer], gradient: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
    for optimizer in optimizers:
        optimizer.step()
