"""The versions that two sides of a cluster must have in common."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGE = "ammd"


def package_version() -> str | None:
    """The installed version of this package; None where it runs from a folder and is not installed."""
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Ray, Python and this package, as they are here."""
    return {"Ray": version("ray"), "Python": platform.python_version(), "distill": package_version()}
