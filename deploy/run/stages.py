"""The stages of a run, in their order.

    cut -> warm start -> teacher corpora -> proxy -> distillation, with its evaluations

A stage receives the run's inputs and returns them with the checkpoint that it has found or trained. It
leaves a file or folder that shows that it is done, so a resumed run skips it. The driver, which executes the
stages, loads no rows and no model: it starts actors, waits for them and shows their progress.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deploy.run.cache import keep_proxy, proxy_folder, proxy_training_s
from deploy.run.context import RunContext
from deploy.run.estimates import sampler_name
from deploy.run.progress import training_line
from deploy.run.rates import Rates
from distill.config import SftConfig
from distill.interfaces import Holder, Role
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs


def cut(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Cut the student from the teacher, if the configuration asks for it."""
    if run.config.student.init.source is None or Path(inputs.student_dir).exists():
        return inputs
    run.progress.show("student: choosing the teacher's layers to keep", force=True)
    with run.record.timed("cut"):
        choice = run.backend.wait({"learner": run.learner.cut.remote(inputs)})["learner"]
    run.progress.say(f"student: {choice}")
    return inputs


def warm_start(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Fine-tune the student on the references, if the configuration asks for it."""
    if not run.config.sft.enabled:
        return inputs
    out = RunFolder(inputs.run_dir).sft
    if not out.exists():
        assert inputs.references is not None  # the preflight has checked it
        _fit(run, inputs, "warm start", inputs.student_dir, inputs.references, out, run.config.sft)
    return replace(inputs, student_dir=str(out))


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
        writer = run.start_actor("corpus", CorpusActor, run.config.rollout.num_threads)
        run.wait_briefly(
            {
                "corpus": writer.start.remote(
                    run.config, inputs.teacher_dir, inputs.stop_token_ids, inputs.num_tokens
                )
            }
        )
        total, num_written, num_tokens = sum(corpus.num_texts for corpus in missing), 0, 0
        for corpus in missing:

            def show(before: int = num_written) -> None:
                stats = run.backend.poll(writer.stats.remote()) or {}
                written = before + stats.get("corpus/num_rows", 0.0)
                run.progress.show(f"teacher corpus: {written:.0f}/{total} texts")

            work = writer.write.remote(
                corpus.prompts, corpus.num_prompts, corpus.samples_per_prompt, corpus.file
            )
            num_tokens += run.backend.wait({"corpus": work}, tick=show)["corpus"]
            num_written += corpus.num_texts
        if not answers_are_there:
            work = writer.answer_shown.remote(inputs.shown_prompts, inputs.teacher_answers)
            run.backend.wait({"corpus": work})
        run.backend.end_actor("corpus")
    run.record.tokens["corpus"] = num_tokens
    seconds = run.record.timing_s["corpus"]
    run.progress.say(f"teacher corpus: wrote {total} texts, {num_tokens} tokens, in {seconds:.0f} s")
    return inputs


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
        totals = _fit(run, inputs, "proxy", start, inputs.teacher_text, out, run.config.proxy.training)
        keep_proxy(out, cached, totals["seconds"])
    run.record.proxy_training_s = proxy_training_s(cached)
    return replace(inputs, scoring_dir=str(cached))


def distil(run: RunContext, inputs: RunInputs) -> RunInputs:
    """Start the engines and train the student to the last update."""
    with run.record.timed("start_engines"):
        run.progress.show("starting engines", force=True)
        actors = _start_distillation(run, inputs)
    _train(run, actors)
    _record_actors(run, actors)
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


@dataclass(frozen=True)
class _Distillation:
    """Handles of the actors of the last stage, apart from the learner's."""

    replay: Any
    sampler: Any
    """Samples the student: for training, or only for evaluations."""
    scorers: dict[str, Any]
    """The teacher, and its proxy if there is one. The last one fills the payload."""

    @property
    def scorer(self) -> Any:
        return list(self.scorers.values())[-1]


def _fit(
    run: RunContext, inputs: RunInputs, name: str, model: str, corpus: str, out: Path, training: SftConfig
) -> dict[str, float]:
    """Train ``model`` by cross-entropy into the checkpoint ``out``; returns the totals of the training."""
    updates = training.num_updates
    with run.record.timed(out.name):
        work = run.learner.fit.remote(inputs, model, corpus, str(out), training)

        def show() -> None:
            facts = run.backend.poll(run.learner.facts.remote()) or {}
            loss = f", loss {facts['fit_loss']:.3f}" if "fit_loss" in facts else ""
            run.progress.show(f"{name}: update {facts.get('fit_update', 0)}/{updates}{loss}")

        totals = run.backend.wait({"learner": work}, tick=show)["learner"]
    run.record.tokens[out.name] = totals["num_tokens"]
    seconds = run.record.timing_s[out.name]
    run.progress.say(f"{name}: done after {updates} updates, loss {totals['loss']:.3f}, {seconds:.0f} s")
    return totals


def _start_distillation(run: RunContext, inputs: RunInputs) -> _Distillation:
    """Start the actors with their engines, and load the newest checkpoint."""
    from actors.shells import ReplayActor, RolloutActor, TeacherActor

    config = run.config
    num_teacher_rows = pq.read_metadata(inputs.teacher_text).num_rows
    replay = run.start_actor("replay", ReplayActor, 1, config, inputs.num_prompts, num_teacher_rows)
    sampler = run.start_actor(sampler_name(config), RolloutActor, config.rollout.num_threads)
    models: dict[Role, str] = {"teacher": inputs.teacher_dir}
    if inputs.has_proxy:
        models["proxy"] = inputs.scoring_dir
    scorers: dict[str, Any] = {
        name: run.start_actor(name, TeacherActor, config.scoring.num_threads) for name in models
    }
    starting = {
        sampler_name(config): sampler.start.remote(config, inputs, Holder("rollout", 0)),
        "learner": run.learner.load.remote(inputs),
    }
    for role, model_dir in models.items():
        starting[role] = scorers[role].start.remote(config, inputs, Holder(role, 0), model_dir)
    state = run.wait_briefly(starting)["learner"]
    if state is not None:
        run.wait_briefly({"replay": replay.load_state.remote(state["ledger"])})
        run.progress.say(f"resumed from the checkpoint after update {state['updates_done']}")
    return _Distillation(replay, sampler, scorers)


def _train(run: RunContext, actors: _Distillation) -> None:
    """Run the loops of all actors until the learner has done the last update."""
    replay, teacher = actors.replay, actors.scorers["teacher"]
    loops = {"scorer": actors.scorer.run.remote(replay)}
    if run.config.recipe.uses_student_text:
        loops["rollout"] = actors.sampler.run.remote(replay)
    loops["learner"] = run.learner.train.remote(replay, actors.sampler, actors.scorer, teacher)
    rates, shown = Rates(), set[str]()

    def show() -> None:
        facts = run.backend.poll(run.learner.facts.remote())
        if not facts:
            return
        for alarm in facts.get("alarms", ()):
            if alarm not in shown:
                run.progress.say(f"warning: {alarm}")
                shown.add(alarm)
        rates.observe(facts)
        run.progress.show(training_line(facts | rates.outlook(), rates.tokens_per_s()))

    result = run.backend.wait(loops, tick=show)["learner"]
    run.record.updates, run.record.policy_version = result["updates"], result["policy_version"]
    run.record.timing_s |= result["timing_s"]
    run.record.tokens["learner"] = result["num_tokens"]


def _record_actors(run: RunContext, actors: _Distillation) -> None:
    """Record the tokens and the busy times of the sampler and the scorers."""
    sampler = sampler_name(run.config)
    handles = {sampler: actors.sampler} | actors.scorers
    stats = run.wait_briefly({name: actor.stats.remote() for name, actor in handles.items()})
    for name in actors.scorers:
        run.record.tokens[f"{name}_scored"] = stats[name]["teacher/num_tokens"]
        run.record.timing_s[f"{name}_busy"] = stats[name]["timing/teacher_busy_s"]
    run.record.tokens["rollout"] = stats[sampler]["rollout/num_tokens"]
    run.record.timing_s["rollout_busy"] = stats[sampler]["timing/rollout_busy_s"]
