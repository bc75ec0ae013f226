"""The stages of a run, in their order.

    cut -> warm start -> teacher corpora -> proxy -> distillation, with its evaluations

A stage receives the run's inputs and returns them with the checkpoint that it has found or trained. It
leaves a file or folder that shows that it is done, so a resumed run skips it, and a stage that loses an actor begins
again. The driver, which executes the stages, loads no rows and no model: it starts actors, has them work and shows
their progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.run.before_training import outliving, wait_for_work
from deploy.run.cache import keep_proxy, note_proxy_training, proxy_folder, proxy_training_s
from deploy.run.context import RunContext
from deploy.run.tracking.kinds import start_trackers
from deploy.run.training.live import LiveTraining
from deploy.run.training.run import train_fleet, training_summary
from deploy.run.training.start import start_fleet
from distill.config import SftConfig
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs


@outliving
def cut(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Cut the student from the teacher, if the configuration asks for it."""
    if run.config.student.init.source is None or Path(inputs.student_dir).exists():
        return inputs
    run.progress.show("student: choosing the teacher's layers to keep", force=True)
    with run.record.timed("cut"):
        choice = wait_for_work(run, "learner", run.learner.cut.remote(inputs), run.learner.facts.remote)
    run.progress.say(f"student: {choice}")
    return inputs


@outliving
def warm_start(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Fine-tune the student on the references, if the configuration asks for it."""
    if not run.config.sft.enabled:
        return inputs
    out = RunFolder(inputs.run_dir).sft
    if not out.exists():
        assert inputs.references is not None  # the preflight has checked it
        _fit(run, inputs, "warm start", inputs.student_dir, inputs.references, out, run.config.sft)
    return replace(inputs, student_dir=str(out))


@outliving
def write_corpora(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Sample the teacher's text on the training and the held-out prompts, unless the cache has it.

    The teacher also answers the prompts that the report shows.
    """
    from actors.shells import CorpusActor

    heldout = _Corpus(inputs.heldout_prompts, run.config.evaluation.num_prompts, 1, inputs.heldout_corpus)
    training = _Corpus(
        inputs.train_prompts,
        inputs.num_corpus_prompts,
        run.config.corpus.samples_per_prompt,
        inputs.teacher_text,
    )
    missing = [
        corpus for corpus in (heldout, training) if corpus.num_texts and not Path(corpus.file).exists()
    ]
    answers_are_there = Path(inputs.teacher_answers).exists()
    if not missing and answers_are_there:
        run.progress.say("teacher corpus: found in the cache")
        return inputs
    with run.record.timed("corpus"):
        writer = run.start_actor("corpus", CorpusActor)
        run.wait_briefly(
            {
                "corpus": writer.start.remote(
                    run.corpus_config, inputs.teacher_dir, inputs.stop_token_ids, inputs.num_tokens
                )
            }
        )
        total, num_written, num_tokens = sum(corpus.num_texts for corpus in missing), 0, 0
        for corpus in missing:

            def show(stats: Mapping[str, float], before: int = num_written) -> None:
                written = before + stats["corpus/num_rows"]
                run.progress.show(f"teacher corpus: {written:.0f}/{total} texts")

            work = writer.write.remote(
                corpus.prompts, corpus.num_prompts, corpus.samples_per_prompt, corpus.file
            )
            num_tokens += wait_for_work(run, "corpus", work, writer.stats.remote, show)
            num_written += corpus.num_texts
        if not answers_are_there:
            work = writer.answer_shown.remote(inputs.shown_prompts, inputs.teacher_answers)
            wait_for_work(run, "corpus", work, writer.stats.remote)
        run.backend.end_actor("corpus")
    run.record.tokens["corpus"] = num_tokens
    seconds = run.record.timing_s["corpus"]
    run.progress.say(f"teacher corpus: wrote {total} texts, {num_tokens} tokens, in {seconds:.0f} s")
    return inputs


@outliving
def train_proxy(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Train the proxy, which provides probabilities when the teacher gives only text."""
    if run.config.recipe.teacher_gives == "probabilities":
        return inputs
    start = inputs.proxy_init or inputs.student_dir
    if run.config.proxy.num_updates == 0:
        return replace(inputs, scoring_dir=start)
    cached = proxy_folder(run.config, Path(start), Path(inputs.teacher_text))
    if cached.exists():
        run.progress.say("proxy: found in the cache")
    else:
        out = Path(inputs.run_dir) / "proxy"
        if not out.exists():
            totals = _fit(run, inputs, "proxy", start, inputs.teacher_text, out, run.config.proxy.training)
            note_proxy_training(out, totals["seconds"])
        keep_proxy(out, cached)
    run.record.proxy_training_s = proxy_training_s(cached)
    return replace(inputs, scoring_dir=str(cached))


def distil(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Start the engines and train the student to the last update."""
    with run.record.timed("start_engines"):
        run.progress.show("starting engines", force=True)
        fleet, state = outliving(start_fleet)(run, inputs)
    if state is not None:
        run.progress.say(f"resumed from the checkpoint after update {state['updates_done']}")
    updates_done = state["updates_done"] if state is not None else 0
    folder = RunFolder(inputs.run_dir)
    with start_trackers(run.config, folder, updates_done, run.progress.say) as trackers:
        training = train_fleet(run, inputs, fleet, state, LiveTraining(run.progress), trackers)
        trained = asyncio.run(training)
    run.record.training(**vars(trained))
    run.progress.say(training_summary(trained, run.config))
    return inputs


STAGES: tuple[Callable[[RunContext, RunInputs], RunInputs], ...] = (
    cut,
    warm_start,
    write_corpora,
    train_proxy,
    distil,
)


@dataclass(frozen=True)
class _Corpus:
    """A file of teacher text that a run needs."""

    prompts: str
    num_prompts: int
    samples_per_prompt: int
    file: str

    @property
    def num_texts(self) -> int:
        return self.num_prompts * self.samples_per_prompt


def _fit(
    run: RunContext, inputs: RunInputs, name: str, model: str, corpus: str, out: Path, training: SftConfig
) -> dict[str, float]:
    """Train ``model`` by cross-entropy into the checkpoint ``out``; returns the totals of the training."""
    updates = training.num_updates
    with run.record.timed(out.name):
        work = run.learner.fit.remote(inputs, model, corpus, str(out), training)

        def show(facts: Mapping[str, Any]) -> None:
            loss = f", loss {facts['fit_loss']:.3f}" if "fit_loss" in facts else ""
            run.progress.show(f"{name}: update {facts.get('fit_update', 0)}/{updates}{loss}")

        totals = wait_for_work(run, "learner", work, run.learner.facts.remote, show)
    run.record.tokens[out.name] = totals["num_tokens"]
    seconds = run.record.timing_s[out.name]
    run.progress.say(f"{name}: done after {updates} updates, loss {totals['loss']:.3f}, {seconds:.0f} s")
    return totals
