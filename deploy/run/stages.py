"""`distill train`: all stages of a run that are not done yet, in one cluster.

    prepare -> warm start -> teacher corpus -> distillation (with evaluation) -> summary

Each stage leaves a file or folder that says it is done, so a run that was ended goes on where
it stopped. The driver holds no rows and no model: it starts actors, waits and shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deploy.cluster.in_process import InProcess
from deploy.cluster.memory import MemorySampler
from deploy.cluster.ray_cluster import Cluster
from deploy.run.preflight import Preflight
from deploy.run.prepare import Prepared, keep_proxy, prepare, proxy_in_cache, training_seconds
from deploy.run.progress import Progress, training_line
from deploy.run.rates import Rates
from distill.config import ClusterConfig, RunConfig, SftConfig
from distill.config.load import load_config
from distill.config.tree import fingerprint, flat_settings, to_yaml
from distill.data import read_table, write_table
from distill.errors import ConfigError
from distill.evaluation import load_evaluation
from distill.machine.hardware import usable_cores
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from distill.run.metrics import EventLog
from distill.schema import trajectory_schema

NODE = "local"


def train(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Run, or go on with, the run of ``config.run_dir``; returns its summary.

    Raises: ConfigError before anything starts; ActorFailed when a stage fails.
    """
    folder = RunFolder(config.run_dir)
    if (summary := _finished(folder, config)) is not None:
        progress.say(f"{folder.path} is finished ({summary['updates']} updates); nothing to do")
        return summary
    _refuse_another_config(folder, config)
    preflight = Preflight(config)
    for check in preflight.run():
        if check.status == "warn":
            progress.say(
                f"warning: {check.message}; {check.remedy}" if check.remedy else f"warning: {check.message}"
            )
        elif check.status == "pass" and check.name in ("student", "data"):
            progress.say(f"{check.name}: {check.message}")
    preflight.require()
    with folder:
        resumes = folder.create(to_yaml(config), fingerprint(config))
        progress.say(f"{'going on with' if resumes else 'new run'} {folder.path}")
        run = Run(config, folder, prepare(config, preflight, folder), progress)
        return run.run()


def resume(run_dir: str, progress: Progress) -> dict[str, Any]:
    """Go on with the run of a folder, by its own config.yaml.

    Raises: ConfigError when no run is there.
    """
    folder = RunFolder(run_dir)
    folder.require()
    config = load_config(folder.config, [f"run_dir={folder.path}"])
    return train(config, progress)


def _finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run of this very configuration that has ended."""
    if not folder.exists or folder.fingerprint != fingerprint(config):
        return None
    return folder.read_summary()


def _refuse_another_config(folder: RunFolder, config: RunConfig) -> None:
    """Before the costlier checks, and naming what differs. The folder itself refuses it, too."""
    if not folder.exists or folder.fingerprint == fingerprint(config):
        return
    there = flat_settings(load_config(folder.config))
    here = flat_settings(config)
    differing = [name for name in here if name != "run_dir" and here[name] != there.get(name)]
    shown = ", ".join(f"{name}={here[name]} (there {there.get(name)})" for name in differing[:3])
    must = f"hold a run of this configuration (it differs in {shown})"
    raise ConfigError("run_dir", folder.path, must, "choose another run_dir, or train --resume it as it is")


class Run:
    """The stages of one run."""

    def __init__(self, config: RunConfig, folder: RunFolder, prepared: Prepared, progress: Progress) -> None:
        self.config = config
        self.folder = folder
        self.prepared = prepared
        self.progress = progress
        self.events = EventLog(folder.path)
        self.timing_s: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self.proxy_training_s: float | None = None
        """Of the proxy in use, by whichever run trained it."""
        self.start = time.monotonic()

    def run(self) -> dict[str, Any]:
        self.events.write("started", incarnation=self.folder.incarnation)
        with ExitStack() as stack:
            with self._timed("start_ray"):
                self.cluster = stack.enter_context(_cluster(self.config.cluster, self.folder.run_id))
            self.memory = stack.enter_context(MemorySampler({"driver": os.getpid()}))
            for pid in self.cluster.service_pids():
                self.memory.add("ray", pid)
            learner = self._start_learner()
            student_dir = self._warm_start(learner)
            self._write_corpora()
            scoring_dir = self._train_proxy(learner, student_dir)
            result = self._distil(learner, self._inputs(student_dir, scoring_dir))
            peak = self.memory.stop()
        summary = self._summary(result, peak)
        self.folder.write_summary(summary)
        self.events.write("finished", updates=summary["updates"])
        return summary

    # Stages

    def _warm_start(self, learner: Any) -> Path:
        """The student that distillation starts from."""
        if not self.config.sft.enabled:
            return self.prepared.student_init
        out = self.folder.path / "sft"
        if out.exists():
            return out
        assert self.prepared.references is not None
        self._fit(learner, "warm start", self.prepared.student_init, self.prepared.references, out,
                  self.config.sft)  # fmt: skip
        return out

    def _train_proxy(self, learner: Any, student_dir: Path) -> Path:
        """The model whose states are scored: the teacher, or what stands in for its probabilities."""
        if self.config.recipe.teacher_gives == "probabilities":
            return self.prepared.teacher_dir
        start, corpus = self.prepared.proxy_init or student_dir, self.prepared.teacher_corpus
        if self.config.proxy.num_updates == 0:
            return start
        cached = proxy_in_cache(self.config, start, corpus)
        if cached.exists():
            self.progress.say("proxy: in the cache")
        else:
            out = self.folder.path / "proxy"
            totals = self._fit(learner, "proxy", start, corpus, out, self.config.proxy.training)
            keep_proxy(out, cached, totals["seconds"])
        self.proxy_training_s = training_seconds(cached)
        return cached

    def _fit(
        self, learner: Any, what: str, model: Path, corpus: Path, out: Path, training: SftConfig
    ) -> dict[str, float]:
        """A stage of cross-entropy, whose result is the checkpoint ``out``; returns its totals."""
        stage, updates = out.name, training.num_updates
        with self._timed(stage):
            work = learner.fit.remote(str(model), str(corpus), str(out), training)

            def tick() -> None:
                facts = self.cluster.poll(learner.facts.remote()) or {}
                loss = facts.get("fit_loss")
                shown = f", loss {loss:.3f}" if loss is not None else ""
                self.progress.show(f"{what}: update {facts.get('fit_update', 0)}/{updates}{shown}")

            totals = self.cluster.wait({"learner": work}, tick=tick)["learner"]
        self.tokens[stage] = totals["num_tokens"]
        self.progress.say(
            f"{what} done: {updates} updates, loss {totals['loss']:.3f}, {self.timing_s[stage]:.0f} s"
        )
        return totals

    def _write_corpora(self) -> None:
        """The teacher's text, where the cache has none of this fingerprint."""
        prepared = self.prepared
        wanted = [
            (prepared.heldout_prompts, self.config.evaluation.num_prompts, 1, prepared.heldout_corpus),
            (prepared.train_prompts, prepared.num_corpus_prompts, self.config.corpus.samples_per_prompt,
             prepared.teacher_corpus),
        ]  # fmt: skip
        missing = [work for work in wanted if work[1] and not work[3].exists()]
        if not missing:
            self.progress.say("teacher corpus: in the cache")
            return
        from actors.shells import CorpusActor

        with self._timed("corpus"):
            writer = self._actor("corpus", CorpusActor, self.config.rollout.num_threads)
            self._ready(
                {
                    "corpus": writer.start.remote(
                        self.config, str(prepared.teacher_dir), prepared.stop_token_ids, prepared.num_tokens
                    )
                }
            )
            total = sum(num_prompts * samples for _, num_prompts, samples, _ in missing)
            written = tokens = 0.0
            for prompts, num_prompts, samples, path in missing:

                def tick(before: float = written) -> None:
                    rows = (self.cluster.poll(writer.stats.remote()) or {}).get("corpus/num_rows", 0.0)
                    self.progress.show(f"teacher corpus: {before + rows:.0f}/{total} texts")

                work = writer.write.remote(str(prompts), num_prompts, samples, str(path))
                tokens += self.cluster.wait({"corpus": work}, tick=tick)["corpus"]
                written += num_prompts * samples
            self.cluster.end_actor("corpus")
        self.tokens["corpus"] = tokens
        self.progress.say(
            f"teacher corpus written: {total} texts, {tokens:.0f} tokens, {self.timing_s['corpus']:.0f} s"
        )

    def _inputs(self, student_dir: Path, scoring_dir: Path) -> RunInputs:
        prepared = self.prepared
        text = {"sampled": prepared.teacher_corpus, "reference": prepared.references, "none": None}[
            self.config.recipe.teacher_text
        ]
        if text is None:
            text = self.folder.path / "data" / "no-text.parquet"
            write_table(trajectory_schema().empty_table(), text)
        return RunInputs(
            run_dir=str(self.folder.path),
            run_id=self.folder.run_id,
            node=NODE,
            teacher_dir=str(prepared.teacher_dir),
            scoring_dir=str(scoring_dir),
            student_dir=str(student_dir),
            train_prompts=str(prepared.train_prompts),
            heldout_prompts=str(prepared.heldout_prompts),
            text_corpus=str(text),
            heldout_corpus=str(prepared.heldout_corpus),
            stop_token_ids=prepared.stop_token_ids,
            num_tokens=prepared.num_tokens,
        )

    def _distil(self, learner: Any, inputs: RunInputs) -> dict[str, Any]:
        from actors.shells import ReplayActor, RolloutActor, TeacherActor

        config = self.config
        with self._timed("start_engines"):
            self.progress.show("starting engines", force=True)
            num_teacher_rows = read_table(inputs.text_corpus).num_rows
            replay = self._actor(
                "replay", ReplayActor, 1, config, self.prepared.num_prompts, num_teacher_rows
            )
            rollout = self._actor(_sampler_name(config), RolloutActor, config.rollout.num_threads)
            scorer = teacher = self._actor("teacher", TeacherActor, config.scoring.num_threads)
            starting = {
                _sampler_name(config): rollout.start.remote(config, inputs, "rollout-0"),
                "teacher": teacher.start.remote(config, inputs, "teacher-0", inputs.teacher_dir),
                "learner": learner.load.remote(inputs),
            }
            if inputs.has_proxy:
                scorer = self._actor("proxy", TeacherActor, config.scoring.num_threads)
                starting["proxy"] = scorer.start.remote(config, inputs, "proxy-0", inputs.scoring_dir)
            ready = self._ready(starting)
            if (state := ready["learner"]) is not None:
                self._ready({"replay": replay.load_state.remote(state["ledger"])})
                self.progress.say(f"resumed from the checkpoint after update {state['updates_done']}")
        loops = {"scorer": scorer.run.remote(replay)}
        if config.recipe.uses_student_text:
            loops["rollout"] = rollout.run.remote(replay)
        loops["learner"] = learner.train.remote(replay, rollout, scorer, teacher)
        rates = Rates()
        shown: set[str] = set()

        def tick() -> None:
            facts = self.cluster.poll(learner.facts.remote())
            if facts:
                rates.observe(facts)
                for alarm in facts.get("alarms", ()):
                    if alarm not in shown:
                        self.progress.say(f"warning: {alarm}")
                        shown.add(alarm)
                self.progress.show(training_line(facts | rates.outlook(), rates.tokens_per_s()))

        result = self.cluster.wait(loops, tick=tick)["learner"]
        for name, seconds in result["timing_s"].items():
            self.timing_s[name] = seconds
        self.tokens["learner"] = result["num_tokens"]
        scorers = {"teacher": teacher} | ({"proxy": scorer} if inputs.has_proxy else {})
        asked = {_sampler_name(config): rollout} | scorers
        stats = self._ready({name: actor.stats.remote() for name, actor in asked.items()})
        for name in scorers:
            self.tokens[f"{name}_scored"] = stats[name]["teacher/num_tokens"]
            self.timing_s[f"{name}_busy"] = stats[name]["timing/teacher_busy_s"]
        self.tokens["rollout"] = stats[_sampler_name(config)]["rollout/num_tokens"]
        self.timing_s["rollout_busy"] = stats[_sampler_name(config)]["timing/rollout_busy_s"]
        return result

    # Parts

    def _start_learner(self) -> Any:
        from learner.process.shell import LearnerActor

        return self._actor("learner", LearnerActor, self.config.learner.num_threads, self.config)

    def _actor(self, name: str, actor_class: Any, num_threads: int | None, *args: object) -> Any:
        handle = self.cluster.start_actor(name, actor_class, *args, num_threads=num_threads or usable_cores())
        if name in self.cluster.pids:
            self.memory.add(name, self.cluster.pids[name])
        return handle

    def _ready(self, work: dict[str, Any]) -> dict[str, Any]:
        return self.cluster.wait(work, timeout_s=self.config.cluster.start_timeout_s)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        self.events.write("stage_started", stage=stage)
        yield
        self.timing_s[stage] = time.monotonic() - start
        self.events.write("stage_finished", stage=stage, seconds=self.timing_s[stage])

    def _summary(self, result: dict[str, Any], peak: dict[str, int]) -> dict[str, Any]:
        before, after = (load_evaluation(self.folder.evaluation(label)) for label in ("before", "after"))
        wall = time.monotonic() - self.start
        return {
            "updates": result["updates"],
            "policy_version": result["policy_version"],
            "recipe": self.config.recipe.name,
            "engine": self.config.rollout.engine,
            "before": before.to_dict(),
            "after": after.to_dict(),
            "best": self.folder.read_best(),
            "timing_s": {name: round(seconds, 2) for name, seconds in self.timing_s.items()},
            "proxy_training_s": self.proxy_training_s,
            "tokens": {name: int(count) for name, count in self.tokens.items()},
            "peak_pss_bytes": peak,
            "wall_s": round(wall, 2),
            "incarnations": self.folder.incarnation,
        }


def _cluster(config: ClusterConfig, run_id: str) -> Cluster | InProcess:
    return Cluster(config, run_id) if config.backend == "ray" else InProcess(run_id)


def _sampler_name(config: RunConfig) -> str:
    """An actor that samples for evaluations alone is not called a rollout actor."""
    return "rollout" if config.recipe.uses_student_text else "sampler"
