"""How a user starts the command line of this environment, for the commands that messages offer."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def program() -> str:
    """`distill` where the shell finds this environment's, or else the path of its script, from here."""
    script = Path(sys.executable).with_name("distill")
    found = shutil.which("distill")
    if not script.exists() or (found and os.path.samefile(found, script)):
        return "distill"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
