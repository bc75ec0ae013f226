"""`distill study`: runs every recipe, all tuned in the same way, over several seeds, and resumes.

Each run is a separate process (`distill train`) in a folder that is named by recipe, the fingerprint of its
configuration and the hash of the method's code. A run whose folder is finished is not repeated; when the
method's code changes, every run is. Results are read from the run folders, so the study keeps no other
state that could disagree with them.
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
from deploy.study.tables.run_results import critic_means, curve, final_value, final_values, text_measures
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
        """``num_jobs``: the number of concurrent runs, each on its share of the cores. ``earlier``: results
        of other seeds, which become part of the results; the settings that their tuning chose are used."""
        self.spec = spec
        self.folder = folder
        self.num_jobs = num_jobs
        self.earlier = earlier
        self.say = say
        self.code = method_hash()
        self.task = tasks.known_task(spec.task)
        self._jobs = Jobs(spec, self.task, folder, self.code)

    def run(self) -> dict[str, Any]:
        """Execute all runs that are not finished, then write and return the results.

        Raises: ConfigError before anything runs; FetchError; ProcessFailed; StudyUnfinished when the
        method's code changes while the study runs, when a recipe diverges at every point of the grid, or
        when the baseline diverges with every seed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tuning_jobs = self._tuning_jobs()
        # A reported run can break a rule that no tuning run breaks.
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
            for seed in self.spec.seeds  # seed by seed, so that an interrupted study has complete pairs
            for recipe in self.spec.recipes
        ]
        self._train(reported, done=len(all_tuning), num_runs=num_runs)
        if self.spec.texts:
            self._measure(reported)
        return self._write_results(reported, tuning_jobs, chosen)

    def finished(self) -> dict[str, Any]:
        """Write and return the results of the finished runs, of recipes whose tuning is finished; run nothing.

        Raises: ConfigError; StudyUnfinished when a recipe diverged at every point of the grid, or when the
        baseline has no run yet.
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
        """Require that all runs of the folder use the same teacher, student and prompts."""
        path = self.folder / "task.json"
        identity = tasks.identity(self.task.folder())
        if path.exists() and (before := json.loads(path.read_text())["identity"]) != identity:
            raise ConfigError(
                f"task {self.spec.task}", identity, f"be {before}, which the runs in {self.folder} used",
                "name another --out, because the task's models or prompts have been rebuilt",
            )  # fmt: skip
        write_json(path, {"identity": identity})

    def _require_same_code(self) -> None:
        if (now := method_hash()) != self.code:
            raise StudyUnfinished(
                f"study {self.spec.name}: method hash",
                now,
                f"be {self.code}, as at the start",
                "start the study again, from a git worktree whose code does not change while it runs",
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
        """The chosen settings of every recipe whose tuning is among the jobs.

        The tuning of a recipe with ``tuned_as`` is that of the recipe named there.
        """
        if self.earlier is not None:
            return {recipe: self.earlier["chosen"][recipe] for recipe in self.spec.recipes}
        chosen = {recipe: self._choose(recipe, jobs) for recipe, jobs in tuning_jobs.items()}
        followed = {name: settings.get("tuned_as", name) for name, settings in self.spec.recipes.items()}
        return {name: chosen[other] for name, other in followed.items() if other in chosen}

    def _train(self, jobs: Sequence[Job], *, done: int, num_runs: int) -> None:
        """Execute the runs that are not finished; ``done`` of ``num_runs`` precede these jobs."""
        missing = [job for job in jobs if not job.is_done]
        done += len(jobs) - len(missing)
        if len(missing) < len(jobs):
            self.say(f"{done}/{num_runs}: finished earlier")

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
        empty = self.folder / "empty.yaml"  # every setting is an override
        if not empty.exists():
            write_bytes(empty, b"{}\n")
        train = (sys.executable, "-m", "deploy.cli.main", "train", str(empty))
        argv = (*train, *job.overrides, f"run_dir={job.run_dir}")
        log = self.folder / "logs" / f"{job.run_dir.name}.txt"
        return Command(name, argv, log, may_fail=lambda: job.has_diverged)

    def _measure(self, jobs: Sequence[Job]) -> None:
        """Take the measures of the runs that lack them, then those of each seed's teacher."""
        jobs = [job for job in jobs if not job.has_diverged]
        missing = [job for job in jobs if not are_measured(measures_path(job.run_dir))]
        self._run_measures([self._measuring(job) for job in missing])
        missing = [job for path, job in self._teacher_measures(jobs).items() if not are_measured(path)]
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

    def _teacher_measures(self, jobs: Sequence[Job]) -> dict[Path, Job]:
        """The file for a teacher's measures -> one of the runs with that teacher's answers."""
        keys = {
            Measures.load(measures_path(job.run_dir)).texts_key: job
            for job in jobs
            if are_measured(measures_path(job.run_dir))
        }
        return {teacher_measures_path(self._teacher_texts, key): job for key, job in keys.items()}

    def _choose(self, recipe: str, jobs: list[Job]) -> Settings:
        """The best point of the grid by the mean of the metric over the tuning seeds."""
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
                "finish without diverging at one point of the grid at least",
                "lower the learning rates of tuning.grid",
            )
        for name, values in tuning.grid.items():
            # Strings and booleans have no edge.
            ordered = all(type(value) in (int, float) for value in values)
            if ordered and len(values) > 1 and best[name] in (min(values), max(values)):
                self.say(f"note: {recipe}: the best {name}={best[name]} is at the edge of its grid {values}")
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
            older = f" with the present code, {self.code} (the folder has runs of {', '.join(sorted(there))})"
            raise StudyUnfinished(
                f"study {self.spec.name}: baseline",
                self.spec.baseline,
                f"have a run that finished without diverging{older if there else ''}",
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
                 "final": final_values(job.run_dir),
                 "texts": text_measures(job.run_dir),
                 "critics": critic_means(job.run_dir),
                 "evaluations": [asdict(point) for point in curve(job.run_dir, self.spec.metrics)]}
                for job in jobs
            ],
            "diverged": [{"recipe": job.recipe, "seed": job.seed, "run": job.run_dir.name} for job in diverged],
            "differences": self._differences(jobs),
            "teacher": [
                {"seed": job.seed, "texts": Measures.load(path).values()}
                for path, job in self._teacher_measures(jobs).items() if are_measured(path)
            ],
        }  # fmt: skip

    def _differences(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The differences of every recipe from the baseline, and those of the study's ``comparisons``."""
        run_dirs: dict[int, dict[str, Path]] = {}
        for job in jobs:
            run_dirs.setdefault(job.seed, {})[job.recipe] = job.run_dir
        pairs = [(recipe, self.spec.baseline) for recipe in self.spec.recipes if recipe != self.spec.baseline]
        pairs = list(dict.fromkeys([*pairs, *self.spec.comparisons]))
        measured = all(are_measured(measures_path(job.run_dir)) for job in jobs)
        return differences(run_dirs, pairs, self.spec.metrics, texts=measured)

    def _score(self, job: Job) -> float:
        """The tuning metric of a run; the worst possible value if the run has diverged."""
        if job.has_diverged:
            return -direction(self._tuning_metric) * math.inf
        return final_value(job.run_dir, self._tuning_metric)

    @property
    def _tuning_metric(self) -> str:
        return self.spec.tuning.metric if self.spec.tuning else self.spec.metrics[0]


class StudyUnfinished(DistillError, RuntimeError):
    """A study ends without results."""

    code = "study_unfinished"


def _preflight(job: Job) -> None:
    """Check a recipe before the study's first run.

    Raises: ConfigError for what would end the recipe's runs.
    """
    checks = Preflight(replace(job.config, run_dir=str(job.run_dir)))
    checks.run()
    with of_recipe(job.recipe):
        checks.require()
