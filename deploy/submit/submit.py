"""Checks a request as far as this machine can, uploads the files, and starts the job."""

from __future__ import annotations

import glob
import json
import os
import shlex
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deploy import PRESETS
from deploy.fetch import MODELS
from deploy.job import VERSIONS_VARIABLE, is_file_name, not_uploaded, require_lasting_path
from deploy.submit.archive import Files, require_size, with_package, working_files, write_archive
from deploy.submit.server import JobServer
from deploy.version import versions
from distill.config import RunConfig
from distill.config.load import load_config
from distill.data import KNOWN_DATA
from distill.errors import NO_VALUE, ConfigError

_CONFIG_FOLDER = "submitted"
"""The folder of the archive with a configuration from outside the working directory."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run: a configuration, or a run on the cluster that is to go on."""

    config: Path | None
    resume: str | None
    overrides: Sequence[str]


def submit(request: Request, server: JobServer, root: Path) -> str:
    """Send ``root`` and the request to a cluster; returns the job's id.

    Raises: ConfigError for what cannot be right there; SubmissionFailed.
    """
    files, arguments = contents(request, root)
    require_size(files, root, _upload_limit())
    command = shlex.join(["python", "-m", "deploy.cli", "train", *arguments])
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "job.zip"
        write_archive(files, archive)
        return server.submit(command, archive, {VERSIONS_VARIABLE: json.dumps(versions())})


def contents(request: Request, root: Path) -> tuple[Files, list[str]]:
    """The files of the archive, and the arguments of `distill train` there.

    Raises: ConfigError.
    """
    files = working_files(root)
    if request.resume is not None:
        require_lasting_path(request.resume, "--resume")
        return with_package(files, root), ["--resume", request.resume, *request.overrides]
    if request.config is None:
        must = "be given a configuration or --resume RUN"
        raise ConfigError("submit", NO_VALUE, must, "see `distill submit --help`")
    config = load_config(request.config, request.overrides, PRESETS)
    require_paths(config, files, root)
    path = Path(os.path.abspath(request.config))  # without .., which would lead out of the archive
    inside = path.is_relative_to(root)
    name = str(PurePosixPath(path.relative_to(root))) if inside else f"{_CONFIG_FOLDER}/{path.name}"
    return {**with_package(files, root), name: path}, [name, *request.overrides]


def require_paths(config: RunConfig, files: Files, root: Path) -> None:
    """Check the relative paths of a configuration: what the job reads is uploaded, and what it leaves lasts.

    Raises: ConfigError.
    """
    require_lasting_path(config.run_dir, "run_dir")
    settings: list[tuple[str, str, Container[str]]] = [("data.path", config.data.path, KNOWN_DATA)]
    for name in ("teacher", "student", "proxy"):
        settings.append((f"{name}.model", getattr(config, name).model or "", MODELS))
    for name, text, known in settings:
        if not text or text in known or text.startswith(("/", "~")):
            continue
        is_path = text.startswith(("./", "../")) or glob.has_magic(text) or (root / text).exists()
        if is_path or is_file_name(text):
            _require_uploaded(name, text, files, root)


def _require_uploaded(name: str, text: str, files: Files, root: Path) -> None:
    found = [Path(path) for path in glob.glob(str(root / text))]
    if not found:
        raise not_uploaded(name, text, "it does not exist here either")
    for path in found:
        inside = os.path.normpath(path.relative_to(root))
        if inside.startswith(".."):
            raise not_uploaded(name, text, "it is outside the working directory")
        if inside != "." and not any(file == inside or file.startswith(f"{inside}/") for file in files):
            raise not_uploaded(name, text, "this upload leaves it out, as runs, ignored files and links")


def _upload_limit() -> int:
    """Ray's limit for an uploaded archive, in bytes."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return GCS_STORAGE_MAX_SIZE
