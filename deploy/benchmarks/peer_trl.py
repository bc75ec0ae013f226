"""TRL's side of the benchmark ``peer``: a short distillation with TRL's own trainer, timed from outside its steps.

It runs in the environment of :mod:`deploy.benchmarks.peer_environment`, as a script, and imports nothing of this
project. The only argument is a JSON object; the result is one JSON object in its ``out`` file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer


class Steps(TrainerCallback):
    """Notes the end of every step, and the mean length of its completions, which the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "completions/mean_length" in logs:
            self.rows.append({"end": time.perf_counter(), "mean_length": logs["completions/mean_length"]})


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train; returns the completion tokens and the seconds of the steps after ``warm_up_steps``.

    ``mode``: ``float32``; ``autocast``, with float32 weights and bfloat16 arithmetic, TRL's default; or ``bfloat16``,
    weights included.
    """
    dtype = "bfloat16" if options["mode"] == "bfloat16" else "float32"
    prompts = json.loads(Path(options["prompts"]).read_text())
    config = DistillationConfig(
        output_dir=options["folder"],
        max_steps=options["num_steps"],
        per_device_train_batch_size=options["prompts_per_step"],
        max_completion_length=options["max_new_tokens"],
        beta=1.0,  # reverse KL
        temperature=1.0,
        learning_rate=options["learning_rate"],
        gradient_checkpointing=False,  # memory suffices, and recomputing would make it slower
        bf16=options["mode"] == "autocast",
        model_init_kwargs={"dtype": dtype},
        teacher_model_init_kwargs={"dtype": dtype if options["mode"] != "autocast" else "bfloat16"},
        use_cpu=options["use_cpu"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    steps = Steps()
    trainer = DistillationTrainer(
        model=options["student"],
        teacher_model=options["teacher"],
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in prompts]
        ),
        callbacks=[steps],
    )
    trainer.train()
    first = options["warm_up_steps"]
    measured = steps.rows[first:]
    num_tokens = sum(row["mean_length"] for row in measured) * options["prompts_per_step"]
    return {"num_tokens": num_tokens, "seconds": steps.rows[-1]["end"] - steps.rows[first - 1]["end"]}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["out"]).write_text(json.dumps(run(arguments)))
