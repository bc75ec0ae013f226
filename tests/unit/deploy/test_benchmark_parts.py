"""Parts of the single benchmarks that need no engine."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.benchmarks import peer, peer_environment, push, replay, replay_rows, teacher
from deploy.benchmarks.harness import BenchmarkFailed
from deploy.benchmarks.machine_limit import Model, Speeds, Update, limits_s
from deploy.benchmarks.registry import BENCHMARKS
from deploy.benchmarks.replay_ours import ReadyTeacher
from deploy.benchmarks.replay_peers import fastest_batch
from deploy.benchmarks.workload import draws, open_store, scratch
from deploy.recipes import read_recipes
from distill.config import ScoringConfig
from distill.files import write_json
from distill.replay.segments import FOLDER_PREFIX
from distill.run.folder import RunFolder
from distill.run.metrics import MetricsWriter


def test_a_sweep_of_dead_runs_leaves_the_scratch_folder_alone() -> None:
    with scratch() as folder:
        assert not folder.name.startswith(FOLDER_PREFIX)
        open_store(str(folder), "writer")
        assert (folder / "segments").is_dir()
    assert not folder.exists()


def test_every_round_of_rollouts_has_other_draws_of_the_same_prompts() -> None:
    first, second = draws("student_text", range(4), 4), draws("student_text", range(4, 8), 4)
    assert [draw.index for draw in first] == [draw.index for draw in second] == [0, 1, 2, 3]
    assert {draw.draw_id for draw in first}.isdisjoint(draw.draw_id for draw in second)


def test_a_round_of_scoring_has_every_text_once() -> None:
    size = ScoringConfig().max_num_seqs
    jobs = teacher._jobs(size + 3)
    assert [len(job) for job in jobs] == [size, 3]
    assert [draw.index for job in jobs for draw in job] == list(range(size + 3))
    assert teacher._num_tokens([[1, 2], [1]], [[3, 4, 5], [6]]) == 5


def test_the_pause_of_an_engine_is_timed_and_its_methods_are_restored() -> None:
    class Engine:
        async def pause_generation(self, *, mode: str) -> None:
            assert mode == "keep"

        async def resume_generation(self) -> None:
            await asyncio.sleep(0.01)

    async def run() -> list[float]:
        engine = Engine()
        with push._paused_seconds(engine) as paused:
            await engine.pause_generation(mode="keep")
            await engine.resume_generation()
        await engine.resume_generation()
        return paused

    (seconds,) = asyncio.run(run())
    assert seconds >= 0.01


def test_requests_in_flight_have_different_prompts_and_seeds() -> None:
    requests = push._requests(iter(range(1000)), 8)
    assert len({tuple(request.prompt_tokens) for request in requests}) == push.NUM_IN_FLIGHT
    assert len({request.seed for request in requests}) == push.NUM_IN_FLIGHT


def test_the_speed_of_a_run_is_read_from_its_records(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path)
    for update in range(1, peer.NUM_UPDATES + 1):
        slow = update <= peer.WARM_UP_UPDATES
        counters = {
            "learner/num_input_tokens": 30.0,
            "timing/rollout_busy_s": 0.5,
            "timing/teacher_busy_s": 0.25,
        }
        metrics.write(
            update,
            {
                "policy/student_text.num_tokens": 10.0,
                "timing/update_s": 100.0 if slow else 2.0,
                "timing/learner_busy_s": 50.0 if slow else 1.0,
                "timing/push_s": 0.125,
                **{name: update * value for name, value in counters.items()},
            },
        )
    metrics.close()
    folder = RunFolder(tmp_path)
    write_json(
        folder.summary,
        dict.fromkeys(("updates", "recipe", "before", "after", "timing_s", "wall_s"), 0)
        | {"peak_pss_bytes": {"total": 7}},
    )
    num_updates = peer.NUM_UPDATES - peer.WARM_UP_UPDATES
    assert peer._throughput(tmp_path) == {
        "num_tokens": 10.0 * num_updates,
        "seconds": 2.0 * num_updates,
        "peak_pss_bytes": 7,
        "tokens_of_update": 30.0,
        "response_tokens_of_update": 10.0,
        "rollout_s": 0.5,
        "teacher_s": 0.25,
        "learner_s": 1.0,
        "push_s": 0.125,
        "update_s": 2.0,
    }


def test_the_peers_recipes_exist() -> None:
    names = [settings[0].removeprefix("recipe=") for settings in peer.RECIPES.values()]
    assert set(names) <= read_recipes().keys()


def test_trl_that_cannot_be_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "venv" in command:
            (Path(command[-1]) / "lib" / "python3" / "site-packages").mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching version\n")

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(peer_environment.subprocess, "run", no_network)
    with pytest.raises(BenchmarkFailed, match="ERROR: no matching version") as caught:
        peer_environment.trl_python(lambda line: None)
    assert "\n" not in str(caught.value)


def test_a_command_that_fails_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BenchmarkFailed, match="exit code of part=3 must be 0"):
        peer._run("part", ["sh", "-c", "echo the reason; exit 3"], tmp_path)
    assert "the reason" in capsys.readouterr().err
    assert peer._run("part", ["sleep", "0.3"], tmp_path) > 0


def test_what_is_touched_identifies_the_states(tmp_path: Path) -> None:
    replay_rows.write_rows(tmp_path, 3)
    states = replay_rows.to_tensors(replay_rows.read_rows(tmp_path))["teacher_hidden"]
    assert states.isfinite().all()
    assert replay_rows.touch(states[:2]) == replay_rows.expected_touch(tmp_path, 2)
    assert sum(map(replay_rows.touch, states)) == replay_rows.expected_touch(tmp_path, 3)
    replay_rows.warm_memory(tmp_path, 2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy"] * 3


def test_a_ready_teacher_gives_every_row_once(tmp_path: Path) -> None:
    replay_rows.write_rows(tmp_path, 3)
    states = replay_rows.read_rows(tmp_path)["teacher_hidden"]
    teacher = ReadyTeacher(states)
    found = [asyncio.run(teacher.hidden_states([[1]] * size, [[2]] * size)) for size in (1, 2)]
    assert [len(each) for each in found] == [1, 2]
    assert (found[1][1] == states[2]).all()


def test_the_fastest_batch_is_chosen_after_a_round_to_warm_up() -> None:
    calls: list[int] = []

    def round_of(batch: int) -> dict[str, float]:
        calls.append(batch)
        return {"seconds": 1.0 if calls.count(batch) == 1 else 1.0 / batch}

    assert fastest_batch(round_of, (2, 4), lambda line: None, "x") == (4, {"2": 0.5, "4": 0.25})
    assert calls == [2, 2, 4, 4]


def test_the_replays_pairs_are_rates_of_all_its_labels() -> None:
    names = ("ours", "memcpy", "transferqueue", "torchrl", "pickle", "ours_own", "transferqueue_own")
    found = {name: {"seconds": 1.0} for name in names} | {"torchrl": {"seconds": 2.0}}
    pairs = replay._pairs([found], 10)
    assert pairs.keys() == BENCHMARKS["replay"].labels.keys()
    assert pairs["torchrl"] == [(10.0, 5.0)]
    ((ours, theirs),) = pairs["transferqueue_own"]
    assert ours == theirs  # as many bytes on both sides


def test_the_machine_limit_is_arithmetic_at_its_speeds() -> None:
    speeds = Speeds(flops_per_s={"float32": 100.0, "bfloat16": 200.0}, bytes_per_s=10.0)
    teacher = Model(layer_parameters=30, head_parameters=20)
    student = Model(layer_parameters=10, head_parameters=20)
    update = Update(prompt_tokens=6, response_tokens=4, steps=2)
    found = limits_s(update, teacher=teacher, student=student, speeds=speeds, training_format="float32")
    forward = 2 * 10 * 10 + 2 * 20 * 4  # two for each parameter and token; the head at the response tokens
    assert found == pytest.approx(
        {
            "rollout": forward / 200 + 3 * 2 * 30 / 10,  # the prompts and two steps read every weight
            "teacher": 2 * 30 * 10 / 200 + 2 * 50 / 10,
            "learner": (3 * forward + 2 * 20 * 4) / 100,
            "push": 2 * 30 / 10,
        }
    )
