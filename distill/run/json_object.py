"""Small JSON files of a run, which a person or a broken disk may have changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import ConfigError, first_line


def read_object(name: str, path: Path, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """Raises: ConfigError when the file is not JSON with those keys."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(name, path, f"be JSON ({first_line(error)})", remedy) from None
    if not isinstance(found, dict):
        raise ConfigError(name, path, "be a JSON object", remedy)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ConfigError(name, path, f"contain {', '.join(missing)}", remedy)
    return found
