"""What each command does. Heavy imports are inside, so `distill --help` is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from deploy import PRESETS
from distill.config import RunConfig
from distill.config.load import load_config
from distill.errors import NO_VALUE, ConfigError, DistillError

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


def guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; a user's mistake is one line and exit code 2, without traceback."""
    try:
        return run(options)
    except DistillError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except OSError as error:  # a full disk, a path that cannot be made
        _complain(str(error))
        return FAILED


def train(options: argparse.Namespace) -> int:
    from deploy.report.run_report import run_report
    from deploy.report.terminal import print_report
    from deploy.run.progress import Progress
    from deploy.run.stages import resume
    from deploy.run.stages import train as run_train

    if (options.config is None) == (options.resume is None):
        raise ConfigError(
            "train",
            NO_VALUE,
            "be given a configuration or --resume RUN, one of them",
            "see distill train --help",
        )
    run_dir = options.resume
    try:
        with Progress() as progress:
            if options.resume is not None:
                summary = resume(options.resume, progress)
            else:
                config = _load(options)
                run_dir = config.run_dir
                summary = run_train(config, progress)
    except KeyboardInterrupt:
        _complain(f"interrupted; resume with: distill train --resume {run_dir}")
        return INTERRUPTED
    except ConfigError:
        raise
    except Exception as error:
        if run_dir is None or not Path(run_dir).is_dir():
            raise
        what = str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"
        _complain(f"the run failed: {what}")
        _complain(f"{_keep_failure(run_dir, error)}; resume with: distill train --resume {run_dir}")
        return FAILED
    print_report(run_report(run_dir, summary))
    return DONE


def doctor(options: argparse.Namespace) -> int:
    from deploy.run.preflight import Preflight, failed

    try:
        preflight = Preflight(_load(options))
        checks = preflight.run()
    except ConfigError as error:
        checks = [failed("configuration", error)]
    if options.json:
        print(json.dumps({"checks": [vars(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            remedy = f"; {check.remedy}" if check.remedy else ""
            print(f"{check.status:4}  {check.name}: {check.message}{remedy}")
    return WRONG_REQUEST if any(check.status == "fail" for check in checks) else DONE


def report(options: argparse.Namespace) -> int:
    from deploy.report.run_report import run_report
    from deploy.report.terminal import print_report
    from distill.run.folder import RunFolder

    folder = RunFolder(options.run_dir)
    folder.require()
    summary = folder.read_summary()
    if summary is None:
        raise ConfigError(
            "run_dir",
            folder.path,
            "hold summary.json, which a run writes at its end",
            f"finish it with: distill train --resume {folder.path}",
        )
    print_report(run_report(folder.path, summary))
    return DONE


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
        print(markdown(study_report(load_results(Path(options.study)))))
        return DONE
    spec = load_study(options.study)
    folder = Path(options.out or f"runs/studies/{spec.name}").resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--out", folder, "be a folder, or not there yet", "name another")
    if options.seeds:
        spec = only_seeds(spec, options.seeds)
    earlier = load_earlier(Path(options.earlier), spec) if options.earlier else None
    if earlier:
        spec = without_seeds_of(spec, earlier)
    runner = Study(spec, folder, num_jobs=options.jobs, earlier=earlier)
    results = runner.finished() if options.report else runner.run()
    text = markdown(study_report(results))
    write_bytes(folder / "report.md", text.encode())
    print(text)
    plots = ", ".join(path.name for path in draw(results, folder))
    print(f"in {folder}: report.md, results.json, {plots}")
    return DONE


def chat(options: argparse.Namespace) -> int:
    from deploy.cli.chat import run_chat

    return run_chat(options.model, options.prompt, options.max_new_tokens)


def fetch_model(options: argparse.Namespace) -> int:
    from deploy.fetch import fetch_model

    fetch_model(options.name)
    return DONE


def fetch_data(options: argparse.Namespace) -> int:
    from deploy.fetch import fetch_data

    fetch_data(options.name)
    return DONE


def _keep_failure(run_dir: str, error: Exception) -> str:
    """Keep the error as data and, below the driver's traceback, the actor's; says where.

    A full disk must not hide the failure behind a second one.
    """
    from distill.run.folder import RunFolder

    folder = RunFolder(run_dir)
    try:
        folder.write_failure(error)
    except OSError as unwritten:
        return f"its traceback could not be written to {folder.traceback} ({unwritten})"
    return f"traceback in {folder.traceback}"


def _load(options: argparse.Namespace) -> RunConfig:
    return load_config(options.config, options.overrides, PRESETS)


def _complain(message: str) -> None:
    print(f"distill: {message}", file=sys.stderr)
