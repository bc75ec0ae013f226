"""`distill study`: every recipe, tuned alike, over several seeds; goes on where it stopped.

Each run is a process of its own (`distill train`), in a folder named by recipe, the fingerprint
of its configuration and the hash of the method's code. A run whose folder is finished is not run
again; when the code of the method changes, all are. Results are read from the run folders, so
there is nothing else to keep in step.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deploy.run.preflight import Preflight
from deploy.study.hashes import method_hash, stamps
from deploy.study.jobs import Job, Jobs, of_recipe
from deploy.study.measure.measures_file import Measures, are_measured, measures_path, teacher_measures_path
from deploy.study.pooling import pooled
from deploy.study.processes import Command, run_all
from deploy.study.spec import Settings, StudySpec
from deploy.study.tables.differences import differences
from deploy.study.tables.run_results import critics, curve, final, finals, texts
from deploy.study.tasks import registry as tasks
from distill.errors import NO_VALUE, ConfigError, DistillError
from distill.evaluation import direction
from distill.files import write_bytes, write_json


class Study:
    """A study and its folder."""

    def __init__(
        self,
        spec: StudySpec,
        folder: Path,
        *,
        num_jobs: int = 1,
        earlier: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """``num_jobs``: runs at a time, each on its share of the cores. ``earlier``: results of other
        seeds; what their tuning chose is taken, and they are part of the results here."""
        self.spec = spec
        self.folder = folder
        self.num_jobs = num_jobs
        self.earlier = earlier
        self.say = say
        self.code = method_hash()
        self.task = tasks.known_task(spec.task)
        self._jobs = Jobs(spec, self.task, folder, self.code)

    def run(self) -> dict[str, Any]:
        """All runs that are not finished; returns (and writes) the results.

        Raises: ConfigError before anything runs; FetchError; ProcessFailed; StudyUnfinished when the
        method's code changes meanwhile, or the baseline diverges with every seed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tuning_jobs = self._tuning_jobs()
        # A reported run may break a rule that no tuning run does.
        reported = [
            self._jobs.job(recipe, self.spec.seeds[0], {}, tuning=False) for recipe in self.spec.recipes
        ]
        self.task.make(self.say)
        self._require_same_task()
        for job in reported:
            _preflight(job)
        all_tuning = [job for jobs in tuning_jobs.values() for job in jobs]
        num_runs = len(all_tuning) + len(self.spec.recipes) * len(self.spec.seeds)
        self.say(
            f"study {self.spec.name}: {num_runs} runs of {len(self.spec.recipes)} recipes, code {self.code}"
        )
        self._train(all_tuning, done=0, num_runs=num_runs)
        chosen = self._chosen(tuning_jobs)
        reported = [
            self._jobs.job(recipe, seed, chosen[recipe], tuning=False)
            for seed in self.spec.seeds  # all recipes of a seed first: a study cut short is still paired
            for recipe in self.spec.recipes
        ]
        self._train(reported, done=len(all_tuning), num_runs=num_runs)
        if self.spec.texts:
            self._measure(reported)
        return self._write_results(reported, tuning_jobs, chosen)

    def finished(self) -> dict[str, Any]:
        """Results (written too) of the runs that are there, of recipes whose tuning is; runs nothing.

        Raises: ConfigError; StudyUnfinished when the baseline has no run yet.
        """
        tuning_jobs = {
            recipe: jobs for recipe, jobs in self._tuning_jobs().items() if all(job.is_done for job in jobs)
        }
        chosen = self._chosen(tuning_jobs)
        jobs = [
            self._jobs.job(recipe, seed, chosen[recipe], tuning=False)
            for seed in self.spec.seeds
            for recipe in chosen
        ]
        jobs = [job for job in jobs if job.is_done]
        with_baseline = {job.seed for job in jobs if job.recipe == self.spec.baseline}
        return self._write_results([job for job in jobs if job.seed in with_baseline], tuning_jobs, chosen)

    # Checks

    def _require_same_task(self) -> None:
        """The runs of a folder are of one teacher, one student and one set of prompts."""
        path = self.folder / "task.json"
        identity = tasks.identity(self.task.folder())
        if path.exists() and (before := json.loads(path.read_text())["identity"]) != identity:
            raise ConfigError(
                f"task {self.spec.task}", identity, f"be what the runs in {self.folder} had, {before}",
                     "its models were made anew; name another --out"
            )  # fmt: skip
        write_json(path, {"identity": identity})

    def _require_same_code(self) -> None:
        if (now := method_hash()) != self.code:
            raise StudyUnfinished(
                f"study {self.spec.name}: method hash",
                now,
                f"be {self.code}, as at the start",
                "leave the code alone while a study runs (give it a git worktree), and start it again",
            )

    # Runs

    def _tuning_jobs(self) -> dict[str, list[Job]]:
        tuning = self.spec.tuning
        if tuning is None or self.earlier is not None:
            return {recipe: [] for recipe in self.spec.recipes}
        return {
            recipe: [
                self._jobs.job(recipe, seed, point, tuning=True)
                for point in tuning.points()
                for seed in tuning.seeds
            ]
            for recipe in self.spec.recipes
            if "tuned_as" not in self.spec.recipes[recipe]
        }

    def _chosen(self, tuning_jobs: Mapping[str, list[Job]]) -> dict[str, Settings]:
        """The settings of every recipe whose tuning, or that of the one it follows, is among the jobs."""
        if self.earlier is not None:
            return {recipe: self.earlier["chosen"][recipe] for recipe in self.spec.recipes}
        chosen = {recipe: self._choose(recipe, jobs) for recipe, jobs in tuning_jobs.items()}
        followed = {name: settings.get("tuned_as", name) for name, settings in self.spec.recipes.items()}
        return {name: chosen[other] for name, other in followed.items() if other in chosen}

    def _train(self, jobs: Sequence[Job], *, done: int, num_runs: int) -> None:
        """All that are not finished; ``done`` of ``num_runs`` came before."""
        missing = [job for job in jobs if not job.is_done]
        done += len(jobs) - len(missing)
        if len(missing) < len(jobs):
            self.say(f"{done}/{num_runs}: done before")

        def on_end(command: Command, seconds: float) -> None:
            nonlocal done, left
            done, left = done + 1, left - 1
            pace = (time.monotonic() - began) / (len(missing) - left)
            self.say(
                f"{done}/{num_runs} {command.name}: {seconds:.0f} s"
                + (f", {left} {what} runs left, about {left * pace / 60:.0f} min" if left else "")
            )

        left, began = len(missing), time.monotonic()
        what = "tuning" if jobs and jobs[0].tuning else "reported"
        run_all([self._command(job) for job in missing], self.num_jobs, on_end, self._require_same_code)

    def _command(self, job: Job) -> Command:
        name = f"{job.recipe} seed {job.seed}" + "".join(f" {k}={v}" for k, v in job.tuned.items())
        nothing = self.folder / "empty.yaml"  # every setting is an override
        if not nothing.exists():
            write_bytes(nothing, b"{}\n")
        train = (sys.executable, "-m", "deploy.cli.main", "train", str(nothing))
        argv = (*train, *job.overrides, f"run_dir={job.run_dir}")
        log = self.folder / "logs" / f"{job.run_dir.name}.txt"
        return Command(name, argv, log, may_fail=lambda: job.has_diverged)

    def _measure(self, jobs: Sequence[Job]) -> None:
        """The measures of the runs that lack them, then those of each seed's teacher texts."""
        jobs = [job for job in jobs if not job.has_diverged]
        missing = [job for job in jobs if not are_measured(measures_path(job.run_dir))]
        self._run_measures([self._measuring(job) for job in missing])
        missing = [job for path, job in self._of_teachers(jobs).items() if not are_measured(path)]
        self._run_measures([self._measuring(job, "--teacher") for job in missing])

    def _measuring(self, job: Job, *options: str) -> Command:
        what = "teacher" if options else job.recipe
        module = (sys.executable, "-m", "deploy.study.measure.measure_run")
        return Command(
            f"{what} seed {job.seed}: measures",
            (*module, str(job.run_dir), str(self._teacher_texts), *options),
            self.folder / "logs" / f"{job.run_dir.name}{''.join(options)}-measures.txt",
        )

    def _run_measures(self, commands: Sequence[Command]) -> None:
        run_all(
            commands, self.num_jobs, lambda command, seconds: self.say(f"{command.name}: {seconds:.0f} s")
        )

    @property
    def _teacher_texts(self) -> Path:
        return self.folder / "teacher-texts"

    def _of_teachers(self, jobs: Sequence[Job]) -> dict[Path, Job]:
        """Where the measures of a teacher lie or shall lie -> a run of it."""
        keys = {
            Measures.load(measures_path(job.run_dir)).texts_key: job
            for job in jobs
            if are_measured(measures_path(job.run_dir))
        }
        return {teacher_measures_path(self._teacher_texts, key): job for key, job in keys.items()}

    def _choose(self, recipe: str, jobs: list[Job]) -> Settings:
        """The grid's best point by the mean of the metric over the tuning seeds."""
        tuning = self.spec.tuning
        if tuning is None:
            return {}
        scores: list[tuple[float, Settings]] = []
        for point in tuning.points():
            values = [self._score(job) for job in jobs if job.tuned == point]
            scores.append((direction(tuning.metric) * sum(values) / len(values), point))
        best_score, best = max(scores, key=lambda score: score[0])
        if best_score == -math.inf:
            raise StudyUnfinished(
                f"study {self.spec.name}: {recipe}",
                NO_VALUE,
                "end well at one point of the grid at least; it diverges at every point",
                "lower the learning rates of tuning.grid",
            )
        for name, values in tuning.grid.items():
            ordered = all(type(value) in (int, float) for value in values)  # text, yes and no have no edge
            if ordered and len(values) > 1 and best[name] in (min(values), max(values)):
                self.say(
                    f"note: {recipe}: the best {name}={best[name]} lies at the edge of its grid {values}"
                )
        return best

    # Results

    def _write_results(
        self, jobs: list[Job], tuning_jobs: Mapping[str, list[Job]], chosen: Mapping[str, Settings]
    ) -> dict[str, Any]:
        results = self._results(jobs, tuning_jobs, chosen)
        if self.earlier is not None:
            results = pooled(self.earlier, results)
        if self.spec.baseline not in {run["recipe"] for run in results["runs"]}:
            there = {path.name.rpartition("-")[2] for path in (self.folder / "runs").glob("*")} - {self.code}
            older = f" by {self.code}, the code of now (runs there are by {', '.join(sorted(there))})"
            raise StudyUnfinished(
                f"study {self.spec.name}: baseline",
                self.spec.baseline,
                f"have a run that ended well{older if there else ''}",
                "run the study, or name another baseline",
            )
        write_json(self.folder / "results.json", results)
        return results

    def _results(
        self, jobs: list[Job], tuning_jobs: Mapping[str, list[Job]], chosen: Mapping[str, Settings]
    ) -> dict[str, Any]:
        diverged = [job for job in jobs if job.has_diverged]
        jobs = [job for job in jobs if job not in diverged]
        return {
            "study": self.spec.name,
            "task": self.spec.task,
            **stamps(),
            "asked": self.spec.asked(),
            "metrics": list(self.spec.metrics),
            "baseline": self.spec.baseline,
            "comparisons": [list(pair) for pair in self.spec.comparisons],
            "chosen": dict(chosen),
            "tuning": [
                {"recipe": job.recipe, "seed": job.seed, "tuned": job.tuned,
                 self._tuning_metric: self._score(job)}
                for jobs_of in tuning_jobs.values() for job in jobs_of
            ],
            "runs": [
                {"recipe": job.recipe, "seed": job.seed, "run": job.run_dir.name,
                 "final": finals(job.run_dir),
                 "texts": texts(job.run_dir),
                 "critics": critics(job.run_dir),
                 "evaluations": [asdict(point) for point in curve(job.run_dir, self.spec.metrics)]}
                for job in jobs
            ],
            "diverged": [{"recipe": job.recipe, "seed": job.seed, "run": job.run_dir.name} for job in diverged],
            "differences": self._differences(jobs),
            "teacher": [
                {"seed": job.seed, "texts": Measures.load(path).values()}
                for path, job in self._of_teachers(jobs).items() if are_measured(path)
            ],
        }  # fmt: skip

    def _differences(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Of every recipe from the baseline, and of the pairs that the study asks for."""
        run_dirs: dict[int, dict[str, Path]] = {}
        for job in jobs:
            run_dirs.setdefault(job.seed, {})[job.recipe] = job.run_dir
        pairs = [(recipe, self.spec.baseline) for recipe in self.spec.recipes if recipe != self.spec.baseline]
        pairs = list(dict.fromkeys([*pairs, *self.spec.comparisons]))
        measured = all(are_measured(measures_path(job.run_dir)) for job in jobs)
        return differences(run_dirs, pairs, self.spec.metrics, texts=measured)

    def _score(self, job: Job) -> float:
        """What a tuning run is judged by; the worst where it has diverged."""
        if job.has_diverged:
            return -direction(self._tuning_metric) * math.inf
        return final(job.run_dir, self._tuning_metric)

    @property
    def _tuning_metric(self) -> str:
        return self.spec.tuning.metric if self.spec.tuning else self.spec.metrics[0]


class StudyUnfinished(DistillError, RuntimeError):
    """There is no result; the message says why."""


def _preflight(job: Job) -> None:
    """What would end its recipe's runs, before the first of any."""
    checks = Preflight(replace(job.config, run_dir=str(job.run_dir)))
    checks.run()
    with of_recipe(job.recipe):
        checks.require()
