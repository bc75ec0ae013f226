"""The commands. Heavy imports are inside the functions, so `distill --help` is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deploy.exits import DONE, INTERRUPTED, complain, exit_code
from deploy.safe_text import one_line, printable
from distill.config import RunConfig
from distill.errors import NO_VALUE, ConfigError, DistillError, first_line
from distill.redaction import redacted_values

NEW_FILE = "run.yaml"
"""The file that `distill init` writes unless another is named."""
WATCH_PORT = 8501
SHELLS = ("bash", "zsh", "fish")
"""The shells for which `distill completion` has a script."""
_SCALE_TIMEOUT_S = 600.0
"""Seconds that `distill scale` waits. An actor that joins loads its model first."""


def train(options: argparse.Namespace) -> int:
    from deploy.job import require_submitted_versions
    from deploy.run.progress import Progress
    from deploy.run.settings import config_to_resume
    from deploy.run.train import RunFailed
    from deploy.run.train import train as run_train
    from distill.run.folder import RunFolder

    require_submitted_versions()
    if options.resume is not None:
        config = config_to_resume(options.resume, _changes(options))
    elif options.config is None:
        must = "be given a configuration or --resume RUN"
        raise ConfigError("train", NO_VALUE, must, "see `distill train --help`")
    else:
        config = _load(options)
    folder = RunFolder(config.run_dir)
    then = f"resume with: {folder.resume_command}"
    try:
        with Progress() as progress:
            run_train(config, progress)
    except KeyboardInterrupt as error:
        complain(f"interrupted; {then}" if folder.exists else "interrupted")
        return exit_code(error)
    except RunFailed as failure:
        complain(str(failure))
        complain(f"{failure.where}; {then}")
        return exit_code(failure.error)
    try:
        _show_run(config.run_dir)
    except Exception as error:  # the run itself has succeeded
        complain(
            f"the report could not be written ({first_line(error)}); write it again with `distill report`"
        )
    return DONE


def submit(options: argparse.Namespace) -> int:
    from deploy.submit.server import JobServer
    from deploy.submit.submit import Request, submit

    resumes = options.resume is not None
    request = Request(
        config=Path(options.config) if options.config is not None and not resumes else None,
        resume=options.resume,
        overrides=_changes(options) if resumes else options.overrides,
    )
    server = JobServer(options.address)
    job = submit(request, server, Path.cwd())
    print(f"submitted {job} to {server.address}; to see its logs, or to stop it so that it can be resumed:")
    print(f"  ray job logs --address {server.address} --follow {job}")
    print(f"  ray job stop --address {server.address} {job}", flush=True)
    if not options.follow:
        return DONE
    try:
        return server.follow(job)
    except KeyboardInterrupt:
        complain(f"{job} runs on; the commands above show its logs and stop it")
        return INTERRUPTED


def init(options: argparse.Namespace) -> int:
    from deploy.cli.init import Choices, next_commands, write_config

    file, settings = options.file, options.overrides
    name, equals, _ = file.partition("=")
    if equals and name.replace(".", "").isidentifier():  # the first setting, where no file is named
        file, settings = NEW_FILE, [file, *settings]
    path = Path(file)
    choices = Choices(
        teacher=options.teacher,
        student=options.student,
        num_layers=options.student_layers,
        data=options.data,
        recipe=options.recipe,
        settings=settings,
    )
    write_config(path, choices)
    print(f"wrote {path}; read its comments and adapt it, then run:")
    for command in next_commands(path, choices):
        print(f"  {command}")
    return DONE


def doctor(options: argparse.Namespace) -> int:
    from deploy.run.preflight import Preflight, failed

    try:
        preflight = Preflight(_load(options))
        checks = preflight.run()
    except ConfigError as error:
        checks = [failed("configuration", error)]
    if options.json:
        print(json.dumps(redacted_values({"checks": [vars(check) for check in checks]}), indent=1))
    else:
        for check in checks:
            print(f"{check.status:4}  {one_line(f'{check.name}: {check.text}')}")
    return ConfigError.exit_code if any(check.status == "fail" for check in checks) else DONE


def recipes(options: argparse.Namespace) -> int:
    from deploy.recipes import find_recipe, read_recipes

    if options.name:
        print(find_recipe(options.name).text, end="")
        return DONE
    rows = [("recipe", "teacher gives", "student's text", "description")]
    for recipe in read_recipes().values():
        rows.append((recipe.name, recipe.teacher_must_give, recipe.uses_student_text, recipe.description))
    for name, teacher, student, description in rows:
        print(f"{name:13}  {teacher:13}  {student:15}  {description}")
    print(
        "\n`distill recipes NAME` prints the settings of one, with comments; docs/recipes.md explains them."
    )
    return DONE


def plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from deploy.plan.command import make_plan, plan_report
    from deploy.report.terminal import print_report
    from deploy.run.progress import Progress

    config = _load(options)
    # What a probe says goes where it does not mix with the JSON.
    console = Console(stderr=True, soft_wrap=True, highlight=False) if options.json else None
    with Progress(console) as progress:
        found = make_plan(
            config,
            measured_run=options.measured,
            num_devices=options.devices,
            device_gib=options.device_gib,
            progress=progress,
        )
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print_report(plan_report(found))
    return DONE


def scale(options: argparse.Namespace) -> int:
    from deploy.run.training.scale import request_scale
    from distill.run.folder import RunFolder

    print(one_line(request_scale(RunFolder(options.run_dir), dict(options.pools), _SCALE_TIMEOUT_S)))
    return DONE


def report(options: argparse.Namespace) -> int:
    html = Path(options.html) if options.html else None
    if options.compare:
        _show_comparison([options.run_dir, *options.compare], html)
    else:
        _show_run(options.run_dir, html)
    return DONE


def watch(options: argparse.Namespace) -> int:
    from deploy.report.watch import HOST, follow, serve
    from deploy.run.progress import Progress

    with suppress(KeyboardInterrupt):  # the run goes on
        if options.web:
            with serve(options.run_dir, options.port) as server:
                print(f"http://{HOST}:{server.server_port}/ shows the run; press Ctrl-C to end", flush=True)
                server.serve_forever()
        else:
            with Progress() as progress:
                follow(options.run_dir, progress)
    return DONE


def audit(options: argparse.Namespace) -> int:
    from deploy.report.audit import audit as audit_run
    from distill.config.load import load_config
    from distill.run.folder import RunFolder
    from learner.process.checkpoint import Checkpoints, read_manifest

    folder = RunFolder(options.run_dir)
    folder.require()
    config = load_config(folder.config, (), None)
    ledger = None
    if (
        config.recipe.adapts_fraction
        and (newest := Checkpoints(folder.checkpoints, keep=1).latest()) is not None
    ):
        ledger = read_manifest(newest)["state"]["ledger"]
    for line in audit_run(folder, config, ledger).lines:
        print(one_line(line))
    return DONE


def replay_batch(options: argparse.Namespace) -> int:
    from learner.process.replay_update import replay_update

    replayed = replay_update(options.file)
    for line in replayed.lines:
        print(line)
    return DONE if replayed.first is None else DistillError.exit_code


def trace(options: argparse.Namespace) -> int:
    from deploy.report.run_report import shortest
    from deploy.report.trace import write_trace

    written = write_trace(options.run_dir, Path(options.file) if options.file else None)
    for problem in written.problems:
        complain(problem)
    starts = len(written.incarnations)
    print(f"{written.num_spans} spans of {starts} {'start' if starts == 1 else 'starts'} of the run")
    print(
        f"the trace: {shortest(written.path.absolute())}; open it at https://ui.perfetto.dev, which keeps it in the "
        "browser, or in chrome://tracing",
        flush=True,
    )
    return DONE


def dashboards(options: argparse.Namespace) -> int:
    from deploy.dashboards.serve import serve

    with suppress(KeyboardInterrupt):  # how it is meant to end
        serve(options.runs, options.port)
    return DONE


def _show_run(run_dir: str | Path, html: Path | None = None) -> None:
    """Print the report of a run, write its page, and name what neither of them can show.

    Raises: ConfigError when the folder is not a run's, and when the page cannot be written.
    """
    from deploy.report.run_files import read_run
    from deploy.report.run_page import write_page
    from deploy.report.run_report import run_report, shortest
    from deploy.report.terminal import print_report

    run = read_run(run_dir)
    print_report(run_report(run))
    for problem in run.problems:
        complain(problem)
    print(f"\nthe whole report, for a browser: {shortest(write_page(run, html).absolute())}", flush=True)


def _show_comparison(run_dirs: Sequence[str], html: Path | None) -> None:
    """Print runs side by side, write the page of it, and name what neither of them can show.

    Raises: ConfigError when a folder is not a run's, and when the page cannot be written.
    """
    from deploy.report.compare import comparison, comparison_report, problems, read_runs, write_comparison
    from deploy.report.run_report import shortest
    from deploy.report.terminal import print_report

    runs = read_runs(run_dirs)
    page = comparison(runs)
    print_report(comparison_report(page))
    for problem in problems(runs):
        complain(problem)
    written = write_comparison(runs, page, html)
    print(f"\nthe whole comparison, for a browser: {shortest(written.absolute())}", flush=True)


def study(options: argparse.Namespace) -> int:
    from deploy.report.render import markdown
    from deploy.study.pooling import load_earlier, load_results, only_seeds, without_seeds_of
    from deploy.study.runner import Study
    from deploy.study.spec import load_study
    from deploy.study.tables.plots import draw
    from deploy.study.tables.study_report import study_report
    from distill.files import write_bytes

    if options.report and Path(options.study).suffix == ".json":
        if options.out:
            must = "be left out: results are printed, and nothing is written"
            raise ConfigError("--out", options.out, must, "name a study file to write its report")
        print(printable(markdown(study_report(load_results(Path(options.study))))))
        return DONE
    spec = load_study(options.study)
    folder = Path(options.out or f"runs/studies/{spec.name}").resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--out", folder, "be a folder, or a path that does not exist yet", "choose another")
    if options.seeds:
        spec = only_seeds(spec, options.seeds)
    earlier = load_earlier(Path(options.earlier), spec) if options.earlier else None
    if earlier:
        spec = without_seeds_of(spec, earlier)
    runner = Study(spec, folder, num_jobs=options.jobs, earlier=earlier)
    results = runner.finished() if options.report else runner.run()
    text = markdown(study_report(results))
    write_bytes(folder / "report.md", text.encode())
    print(printable(text))
    plots = ", ".join(path.name for path in draw(results, folder))
    print(f"in {folder}: report.md, results.json, {plots}")
    return DONE


def bench(options: argparse.Namespace) -> int:
    from deploy.benchmarks.command import BenchRequest, list_benchmarks
    from deploy.benchmarks.command import bench as run_bench

    if options.name is None:
        return list_benchmarks()
    return run_bench(
        BenchRequest(
            name=options.name,
            num_pairs=options.pairs,
            json=Path(options.json) if options.json else None,
            baseline=Path(options.baseline) if options.baseline else None,
            tolerated_fall=options.tolerated_fall,
        )
    )


def chat(options: argparse.Namespace) -> int:
    from deploy.cli.chat import run_chat

    return run_chat(options.model, options.prompt, options.max_new_tokens)


def completion(options: argparse.Namespace) -> int:
    from deploy.cli.completion import completion_script
    from deploy.cli.main import parser

    print(completion_script(parser(), options.shell))
    return DONE


def fetch_model(options: argparse.Namespace) -> int:
    from deploy.fetch import fetch_model

    fetch_model(options.name)
    return DONE


def fetch_data(options: argparse.Namespace) -> int:
    from deploy.fetch import fetch_data

    fetch_data(options.name)
    return DONE


def _load(options: argparse.Namespace) -> RunConfig:
    from deploy.run.settings import load_run

    return load_run(options.config, options.overrides)


def _changes(options: argparse.Namespace) -> list[str]:
    """The overrides of a command with --resume. Raises: ConfigError when one is not key=value."""
    changes = [text for text in (options.config, *options.overrides) if text is not None]
    if wrong := next((text for text in changes if "=" not in text), None):
        must = "be key=value after --resume, because a resumed run has a configuration"
        raise ConfigError(options.command, wrong, must, "leave it out")
    return changes
