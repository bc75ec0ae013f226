"""``python -m deploy.cli``: the command line where this package is not installed, as in a submitted job."""

from __future__ import annotations

import sys

try:
    from deploy.cli.main import main
except ModuleNotFoundError as missing:
    print(
        f"distill: {sys.executable} must have the package {missing.name}; on a cluster, start Ray with the "
        "environment of deploy/setup.sh first in PATH",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
