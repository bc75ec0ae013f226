"""An update whose numbers are not finite: it changes nothing, is written to a file, and ends the run or is skipped."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from distill.config import RunConfig
from distill.errors import Diverged
from distill.run.folder import RunFolder
from distill.schema import Trajectory, trajectory_batch, with_teacher_hidden
from learner.distiller import Distiller
from learner.model.student import Student
from learner.process.first_nonfinite import Rows, TensorWatch
from learner.process.replay_update import replay_update
from learner.process.skips import COUNTER, Skips
from learner.process.update_file import KEPT
from tests.tiny import make_world, tiny_config

WIDTH = 64
NAN = 0x7FC0
"""The bits of NaN in bf16."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    make_world(world)
    return world


def config_of(world: Path, *overrides: str) -> RunConfig:
    return tiny_config(
        world, "recipe=ammd", "rollout.samples_per_prompt=2", "learner.num_updates=9", "critic.warmup_updates=0",
        "learner.device=cpu", "critic.num_steps=3", *overrides,
    )  # fmt: skip


def a_distiller(world: Path, *overrides: str) -> Distiller:
    config = config_of(world, *overrides)
    return Distiller(config, Student(config.teacher.model, precision="float32"), config.teacher.model)


def rows_of(update: int = 0, spoil: Callable[[np.ndarray], None] | None = None) -> list[pa.RecordBatch]:
    """Two student draws of two samples, and two teacher draws. ``spoil`` changes the states of the last row."""
    random = np.random.default_rng(update)
    found: list[pa.RecordBatch] = []
    for table, source, samples in (("student_text", "student", 2), ("teacher_text", "teacher", 1)):
        for number in (2 * update, 2 * update + 1):
            rows = [
                Trajectory(
                    draw_id=f"{table}-0-{number}", source=source, prompt_index=number, sample_index=sample,
                    prompt_tokens=random.integers(2, 250, 5), response_tokens=random.integers(2, 250, 6),
                    behavior_logprobs=[-2.0] * 6 if source == "student" else None,
                    policy_versions=[(0, 1)] if source == "student" else None,
                    finish_reason="length",
                )
                for sample in range(samples)
            ]  # fmt: skip
            states = torch.from_numpy(random.normal(size=(samples, 6, WIDTH))).bfloat16()
            bits = states.view(torch.int16).numpy().view(np.uint16)
            if spoil is not None and source == "teacher" and number % 2:
                spoil(bits[0])
            found.append(with_teacher_hidden(trajectory_batch(rows), list(bits)))
    return found


def spoil_token_3(states: np.ndarray) -> None:
    states[3, 7] = NAN


def skips_of(distiller: Distiller, folder: Path, num_skipped: int = 0) -> Skips:
    return Skips(distiller, RunFolder(folder), "0a1b2c3d", num_skipped)


def break_the_gradient(distiller: Distiller) -> None:
    """The forward pass stays finite: the derivative of sqrt is infinite at 0."""
    mlp = distiller.student.model.get_decoder().layers[0].mlp
    mlp.register_forward_hook(lambda module, args, output: output + (0 * output).square().sqrt())


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def break_nothing(distiller: Distiller) -> None: ...


def break_the_weights(distiller: Distiller) -> None:
    """What a step with a learning rate that is far too high leaves: the logits of the student overflow."""
    with torch.no_grad():
        distiller.student.model.get_decoder().layers[1].mlp.down_proj.weight[4, 9] = torch.inf


def break_the_activations(distiller: Distiller) -> None:
    """Finite weights whose product overflows."""
    with torch.no_grad():
        layer = distiller.student.model.get_decoder().layers[1].mlp
        layer.up_proj.weight.fill_(1e30)
        layer.down_proj.weight.fill_(1e30)


def break_the_critics(distiller: Distiller) -> None:
    """The bilinear part of one critic overflows, but no weight does."""
    assert distiller.critics is not None
    with torch.no_grad():
        critic = distiller.critics["student_text"].teacher
        critic.constant.fill_(1e30)  # pyright: ignore
        critic.projection.fill_(1e30)  # pyright: ignore


BREAKS: dict[str, tuple[Callable[[Distiller], None], Callable[[np.ndarray], None] | None, str, str]] = {
    "scores": (break_nothing, spoil_token_3, "scores",
               r"teacher_hidden, shape \d+x64: nan at \[\d+, 7\] \(teacher_text-0-1/0, response token 3\), 1 of \d+ elements"),
    "weights": (break_the_weights, None, "critics",
                r"student\.model\.layers\.1\.mlp\.down_proj\.weight, shape 64x128: inf at \[4, 9\], 1 of 8192 elements"),
    "activations": (break_the_activations, None, "critics",
                    r"the output of model\.layers\.1\.mlp\.down_proj, shape 1x\d+x64: -?(inf|nan) at \[0, 0, 0\] "
                    r"\(\S+-0-\d/\d, prompt token 0\)"),
    "critics": (break_the_critics, None, "critics", r"the result of \w+ in \S+ \(learner\.\S+, line \d+\), shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_failed_update_changes_nothing_and_its_file_names_the_first_tensor(world, tmp_path, case):
    break_it, spoil, stage, first = BREAKS[case]
    distiller = a_distiller(world)
    skips = skips_of(distiller, tmp_path)
    skips.update(rows_of(0), 6)
    break_it(distiller)
    before = distiller.tensors()
    with pytest.raises(Diverged) as caught:
        skips.update(rows_of(0, spoil) if spoil else rows_of(1), 7)
    assert same(before, distiller.tensors()) and distiller.updates_done == 1
    assert all(each.grad is None for each in distiller.student.parameters())
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert file.name == f"update-2-{stage}.safetensors"
    message = str(caught.value)
    assert message.startswith(f"update 2, stage {stage}, weights of version 7, draws student_text-0-")
    assert f"`distill replay-batch {file}`" in message and "learner.on_nonfinite=skip" in message
    replayed = replay_update(file, device="cpu")
    assert replayed.first is not None and re.match(first, replayed.first), replayed.first
    assert replayed.about.update == 2 and replayed.about.policy_version == 7
    assert len(replayed.about.trajectories) == 6


def test_a_gradient_alone_is_enough(world, tmp_path):
    """The file does not know a hook, so the watch looks at the learner itself."""
    distiller = a_distiller(world, "recipe=fkl")
    break_the_gradient(distiller)
    before = distiller.tensors()
    rows = rows_of()
    with pytest.raises(
        Diverged, match=r"^update 1, stage student, .*gradient norm=[\d.]+, nan must be finite"
    ):
        skips_of(distiller, tmp_path).update(rows, 1)
    assert same(before, distiller.tensors())
    batch = distiller.batch(rows)
    watch = TensorWatch(distiller, batch, Rows([str(number) for number in range(6)]))
    with pytest.raises(Diverged), watch.watching():
        distiller.train_on(batch)
    assert watch.first is not None
    pattern = r"the gradient of the output of model\.layers\.0\.mlp\.down_proj, shape 1x\d+x64: nan at \S+, .* \(\d, \w+ token"
    assert re.match(pattern, watch.first), watch.first


def test_a_learning_rate_that_is_far_too_high_ends_in_a_named_tensor(world, tmp_path):
    distiller = a_distiller(world, "recipe=fkl", "learner.learning_rate=1e30", "learner.warmup_fraction=0")
    skips = skips_of(distiller, tmp_path)
    with pytest.raises(Diverged, match=r"^update 2, stage student, .*; .*lower learner\.learning_rate"):
        for update in range(9):
            skips.update(rows_of(update), update)
    (file,) = (tmp_path / "nonfinite").iterdir()
    first = replay_update(file, device="cpu").first
    assert first is not None and re.match(r"the (output|gradient of the output) of model\.", first), first


@pytest.mark.parametrize("recipe", ["ammd", "fkl"])
def test_a_skipped_update_leaves_the_state_and_the_run_goes_on(world, tmp_path, recipe):
    """The updates after it are those of a learner that began them with the same state."""
    distiller = a_distiller(world, "learner.on_nonfinite=skip", f"recipe={recipe}")
    skips = skips_of(distiller, tmp_path)
    assert skips.update(rows_of(0), 1)[COUNTER] == 0 and skips.newest is None
    before = distiller.tensors()
    metrics = skips.update(rows_of(1, spoil_token_3), 2)
    assert same(before, distiller.tensors()) and distiller.updates_done == 2
    assert metrics[COUNTER] == 1 and "policy/loss" not in metrics
    assert metrics["policy/teacher_text.num_tokens"] == 12
    assert skips.newest is not None and Path(skips.newest["file"]).is_file()
    assert skips.newest["draws"] == "student_text-0-2 to 3, teacher_text-0-2 to 3"
    again = skips.update(rows_of(2), 3)
    other = a_distiller(world, f"recipe={recipe}")
    other.load(before, {"updates_done": 2})
    assert again[COUNTER] == 1 and again["policy/loss"] == other.update(rows_of(2))["policy/loss"]
    assert same(distiller.tensors(), other.tensors())


def test_a_recipe_without_scores_looks_at_its_loss(world, tmp_path):
    distiller = a_distiller(world, "learner.on_nonfinite=skip", "recipe=sft")
    skips = skips_of(distiller, tmp_path)
    assert np.isfinite(skips.update(rows_of(0, spoil_token_3), 1)["policy/loss"])
    break_once(distiller)
    assert skips.update(rows_of(1), 2)[COUNTER] == 1
    assert skips.newest is not None and skips.newest["stage"] == "student"
    assert skips.update(rows_of(2), 3)[COUNTER] == 1


def break_once(distiller: Distiller) -> None:
    norm = distiller.student.model.get_decoder().norm

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        handle.remove()
        return output * torch.inf

    handle = norm.register_forward_hook(hook)


def test_critics_that_have_taken_steps_go_back(world, tmp_path):
    """The student's stage comes after the critics', in the first update also before Adam has any state."""
    distiller = a_distiller(world, "learner.on_nonfinite=skip", "learner.keep_activations=true")
    skips = skips_of(distiller, tmp_path)
    break_the_gradient(distiller)
    for update in range(2):
        before = distiller.tensors()
        skips.update(rows_of(update), update)
        assert same(before, distiller.tensors())
    assert skips.newest is not None and skips.newest["stage"] == "student"


def test_one_more_than_the_limit_ends_the_run(world, tmp_path):
    distiller = a_distiller(world, "learner.on_nonfinite=skip", "learner.max_nonfinite=3")
    skips = skips_of(distiller, tmp_path, num_skipped=1)  # the checkpoint knows of one
    for update in (0, 2):
        skips.update(rows_of(update, spoil_token_3), 1)
        skips.update(rows_of(update + 1), 1)
    assert skips.num_skipped == 3
    with pytest.raises(
        Diverged, match=r"must be finite, because learner\.max_nonfinite=3 updates have been skipped; "
    ):
        skips.update(rows_of(4, spoil_token_3), 1)
    assert distiller.updates_done == 4


def test_the_first_file_and_the_newest_are_kept(world, tmp_path):
    distiller = a_distiller(world, "learner.on_nonfinite=skip", "recipe=fkl")
    skips = skips_of(distiller, tmp_path)
    for update in range(KEPT + 2):
        skips.update(rows_of(update, spoil_token_3), 1)
    names = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert names == [f"update-{update}-scores.safetensors" for update in (1, KEPT + 1, KEPT + 2)]


def test_a_full_disk_does_not_hide_the_failure(world, tmp_path):
    (tmp_path / "nonfinite").write_text("no folder")
    with pytest.raises(Diverged, match=r"its batch could not be written \(.*\); look at the engines"):
        skips_of(a_distiller(world), tmp_path).update(rows_of(0, spoil_token_3), 1)


def test_a_score_that_does_not_count_is_no_failure(world):
    distiller = a_distiller(world, "recipe=fkl")
    batch = distiller.batch(rows_of(0, spoil_token_3))
    masked = [replace(pack, counted=pack.counted & ~pack.scores_not_finite()) for pack in batch.packs]
    assert np.isfinite(distiller.train_on(replace(batch, packs=tuple(masked)))["policy/loss"])


# The file


@pytest.mark.parametrize(
    "recipe", ["ammd", "ammd_paper", "fkl", "jsd", "minillm", "gkd", "sft", "oracle_tv", "oracle_skl"]
)
def test_a_sound_update_has_no_tensor_that_is_not_finite(world, recipe):
    """Otherwise an infinity that is meant, or memory that is not written yet, would be named in place of the cause."""
    distiller = a_distiller(world, f"recipe={recipe}")
    batch = distiller.batch(rows_of())
    watch = TensorWatch(distiller, batch, Rows([str(number) for number in range(6)]))
    torch.use_deterministic_algorithms(True, warn_only=True)  # it fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        with watch.watching():
            distiller.train_on(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.first is None
