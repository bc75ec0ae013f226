"""Benchmark ``peer``: the speed of a whole run against TRL's DistillationTrainer.

Both sides distil the same teacher into the same student on the same prompts, with 16 prompts of 64 new tokens per
update. Ours is `distill train` in lock-step, so every update is on-policy as TRL's are. Its speed comes from
metrics.parquet: completion tokens of the student over the seconds of the updates, which contain sampling, scoring,
training and the push. TRL generates with transformers, in the fastest of its number formats and wait
policies.

``trl_rkl`` compares the same loss: reverse KL over the whole vocabulary, on the student's text. ``trl_ammd`` compares
ammd, which also trains on the teacher's text and trains two critics, with that same reverse KL of TRL. Only tokens
that the student wrote are counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deploy.benchmarks.harness import BenchmarkFailed, Measurement, Say, alternate, rates
from deploy.benchmarks.machine_limit import Model, Speeds, Update, limits_s
from deploy.benchmarks.peer_environment import TRL_VERSION, trl_python
from deploy.benchmarks.workload import model_dir, prompt_table
from deploy.cluster.memory import MemorySampler
from deploy.run.model_facts import ModelFacts
from distill.config import LearnerConfig, RolloutConfig, ScoringConfig
from distill.errors import NO_VALUE
from distill.machine.hardware import resolve_dtype

STUDENT_LAYERS = 10
PROMPTS_PER_UPDATE, MAX_NEW_TOKENS = 16, 64
WARM_UP_UPDATES, NUM_UPDATES = 2, 8
LEARNING_RATE = 1e-5
_NUM_PROMPTS, _NUM_HELDOUT = PROMPTS_PER_UPDATE * NUM_UPDATES + 16, 8
_TIMEOUT_S = 1800.0
STAGES = ("rollout", "teacher", "learner", "push", "update")

RECIPES = {
    "rkl": ["recipe=minillm", "recipe.long_weight=0"],  # its single-step part: reverse KL, whole vocabulary
    "ammd": ["recipe=ammd", f"corpus.num_prompts={PROMPTS_PER_UPDATE * NUM_UPDATES}"],
}
TRL_MODES = ("float32", "autocast", "bfloat16")
WAIT_POLICIES = ("passive", "default")
"""What OpenMP's threads do between two pieces of work: they sleep, or by default spin first. Spinning can be faster on
a quiet machine, but beside any other work a step takes several times as long."""


def measure(num_pairs: int, say: Say) -> Measurement:
    """Find TRL's fastest setting in short runs, then alternate whole runs."""
    python = trl_python(say)
    teacher = model_dir(say)
    with tempfile.TemporaryDirectory(prefix="bench-distill-") as folder:
        place = Path(folder)
        student = _cut_student(teacher, place / "student", say)
        prompts = _write_prompts(teacher, place, say)
        trl = partial(_trl, python, teacher, student, prompts, place)
        best, speeds = _fastest(trl, say)
        numbers = iter(range(1 << 30))
        sides = {
            recipe: lambda recipe=recipe: _ours(recipe, teacher, student, place, next(numbers))
            for recipe in RECIPES
        } | {"trl": lambda: trl(*best, NUM_UPDATES)}
        rounds = alternate(num_pairs, sides, say)
        limit_s = None if _has_gpu() else _limit(teacher, student, rounds[0]["rkl"])
    return Measurement(
        pairs={f"trl_{recipe}": rates(rounds, recipe, "trl") for recipe in RECIPES},
        notes={
            "trl_tokens_per_s_by_setting": speeds,
            "trl_setting": " ".join(best),
            "peak_pss_bytes": {
                name: max(found[name]["peak_pss_bytes"] for found in rounds) for name in sides
            },
            "rkl_update_s": {
                stage: statistics.median(found["rkl"][f"{stage}_s"] for found in rounds) for stage in STAGES
            },
            "rkl_update_s_at_machine_speed": limit_s,
            "student_layers": STUDENT_LAYERS,
            "prompts_per_update": PROMPTS_PER_UPDATE,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        versions={"trl": TRL_VERSION},
    )


def _fastest(trl: Callable[..., dict[str, float]], say: Say) -> tuple[tuple[str, str], dict[str, float]]:
    """TRL's fastest (number format, wait policy), and the tokens per second of what was tried."""
    speeds: dict[str, float] = {}

    def speed(mode: str, wait: str) -> float:
        say(f"TRL in {mode}, {wait} waiting, to find its fastest setting")
        found = trl(mode, wait, WARM_UP_UPDATES + 2)
        speeds[f"{mode} {wait}"] = found["num_tokens"] / found["seconds"]
        return speeds[f"{mode} {wait}"]

    mode = max(TRL_MODES, key=lambda mode: speed(mode, WAIT_POLICIES[0]))
    speed(mode, WAIT_POLICIES[1])
    wait = max(WAIT_POLICIES, key=lambda wait: speeds[f"{mode} {wait}"])
    return (mode, wait), speeds


def _cut_student(teacher: Path, out: Path, say: Say) -> Path:
    """Cut the student in a process of its own, whose memory the runs then have."""
    say(f"cutting a student of {STUDENT_LAYERS} layers")
    code = (
        "import sys; from learner.model.cut import cut_student, layer_count; "
        "from learner.model.depth import even_layers; teacher, out, count = sys.argv[1:]; "
        "cut_student(teacher, out, even_layers(layer_count(teacher), int(count)))"
    )
    _run("cut", [sys.executable, "-c", code, str(teacher), str(out), str(STUDENT_LAYERS)], out.parent)
    return out


def _write_prompts(teacher: Path, folder: Path, say: Say) -> Path:
    """Write the prompts as each side reads them: rows with references for ours, a JSON list for TRL's."""
    table = prompt_table(teacher, _NUM_PROMPTS + _NUM_HELDOUT, say).to_pylist()
    rows = [{"prompt": row["prompt_text"], "completion": row["reference_text"]} for row in table]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([row["prompt"] for row in rows]))
    return prompts


def _ours(recipe: str, teacher: Path, student: Path, folder: Path, number: int) -> dict[str, float]:
    """One run of `distill train`; returns its completion tokens and seconds after the warm-up."""
    run_dir = folder / f"run-{number}"
    overrides = [
        *RECIPES[recipe],
        f"run_dir={run_dir}",
        f"teacher.model={teacher}",
        f"student.model={student}",
        f"data.path={folder / 'rows.jsonl'}",
        f"data.num_heldout={_NUM_HELDOUT}",
        "data.on_long_prompt=skip",
        "sft.enabled=false",
        f"corpus.max_new_tokens={MAX_NEW_TOKENS}",
        f"rollout.max_new_tokens={MAX_NEW_TOKENS}",
        "rollout.samples_per_prompt=1",
        f"learner.num_updates={NUM_UPDATES}",
        f"learner.prompts_per_update={PROMPTS_PER_UPDATE}",
        f"learner.teacher_rows_per_update={PROMPTS_PER_UPDATE}",
        f"learner.learning_rate={LEARNING_RATE}",
        "evaluation.every=0",
        "evaluation.num_prompts=2",
        "evaluation.num_prompts_during=2",
        "scoring.check=2",
        f"checkpoint.every={NUM_UPDATES}",
    ]
    config = folder / "ours.yaml"
    config.write_text("seed: 0\n")
    _run(recipe, [sys.executable, "-m", "deploy.cli.main", "train", str(config), *overrides], folder)
    return _throughput(run_dir)


def _throughput(run_dir: Path) -> dict[str, float]:
    """What the records of a run say about the updates after the warm-up."""
    from distill.run.folder import RunFolder
    from distill.run.metrics import read_metrics

    rows = read_metrics(run_dir).to_pylist()[WARM_UP_UPDATES:]
    summary = RunFolder(run_dir).read_summary()
    assert summary is not None  # the command has succeeded
    first, last, updates = rows[0], rows[-1], len(rows) - 1

    def each(name: str) -> float:
        """What one update adds to a counter."""
        return (last[name] - first[name]) / updates

    return {
        "num_tokens": sum(row["policy/student_text.num_tokens"] for row in rows),
        "seconds": sum(row["timing/update_s"] for row in rows),
        "peak_pss_bytes": summary["peak_pss_bytes"]["total"],
        "tokens_of_update": each("learner/num_input_tokens"),
        "response_tokens_of_update": sum(row["policy/student_text.num_tokens"] for row in rows) / len(rows),
        "rollout_s": each("timing/rollout_busy_s"),
        "teacher_s": each("timing/teacher_busy_s"),
        "learner_s": statistics.mean(row["timing/learner_busy_s"] for row in rows),
        "push_s": statistics.mean(row["timing/push_s"] for row in rows),
        "update_s": statistics.mean(row["timing/update_s"] for row in rows),
    }


def _limit(teacher: Path, student: Path, found: dict[str, float]) -> dict[str, float]:
    """Seconds of each stage of a reverse-KL update if the machine did nothing else (:mod:`machine_limit`)."""
    response = found["response_tokens_of_update"]
    update = Update(
        prompt_tokens=found["tokens_of_update"] - response,
        response_tokens=response,
        steps=MAX_NEW_TOKENS,
    )
    limits = limits_s(
        update,
        teacher=_sizes(teacher, ScoringConfig().dtype),
        student=_sizes(student, RolloutConfig().dtype),
        speeds=Speeds.measure(),
        training_format=resolve_dtype(LearnerConfig().precision, "cpu"),
    )
    return {**limits, "update": sum(limits.values())}


def _sizes(folder: Path, dtype: Any) -> Model:
    facts = ModelFacts.read(folder, "model", "fetch it again")
    number_format = resolve_dtype(dtype, "cpu")
    head = facts.vocab_size * facts.hidden_size
    return Model(
        layer_parameters=facts.num_parameters - head,
        head_parameters=head,
        bytes_per_number=2 if number_format == "bfloat16" else 4,
        number_format=number_format,
    )


def _trl(
    python: Path,
    teacher: Path,
    student: Path,
    prompts: Path,
    folder: Path,
    mode: str,
    wait: str,
    num_steps: int,
) -> dict[str, float]:
    """One run of TRL; returns its completion tokens and seconds after the warm-up."""
    out = folder / "trl.json"
    out.unlink(missing_ok=True)
    options = {
        "teacher": str(teacher),
        "student": str(student),
        "prompts": str(prompts),
        "folder": str(folder / "trl"),
        "out": str(out),
        "mode": mode,
        "num_steps": num_steps,
        "warm_up_steps": WARM_UP_UPDATES,
        "prompts_per_step": PROMPTS_PER_UPDATE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "learning_rate": LEARNING_RATE,
        "use_cpu": not _has_gpu(),
    }
    policy = {} if wait == "default" else {"OMP_WAIT_POLICY": wait}
    script = Path(__file__).with_name("peer_trl.py")
    # -P: the script's folder has modules whose names other packages may import.
    peak = _run("TRL", [str(python), "-P", str(script), json.dumps(options)], folder, **policy)
    return {**json.loads(out.read_text()), "peak_pss_bytes": peak}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(name: str, command: Sequence[str], folder: Path, **variables: str) -> int:
    """Run a command to its end; returns the peak of its memory in bytes. Its output is shown only if it fails.

    ``variables``: environment variables that differ from this process's.

    Raises: BenchmarkFailed.
    """
    log = folder / "output.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **variables}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            with MemorySampler({name: process.pid}) as memory:
                code = process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise BenchmarkFailed(name, NO_VALUE, f"end within {_TIMEOUT_S:.0f} s") from None
        finally:
            process.terminate()  # without effect unless a timeout or Ctrl-C ended the wait
            process.wait()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        print(tail, file=sys.stderr)
        raise BenchmarkFailed(f"exit code of {name}", code, "be 0", "read its last lines above")
    return memory.peaks()[name]
