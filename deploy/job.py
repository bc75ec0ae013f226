"""What differs in a process that Ray started for a submitted job.

Ray unpacks the uploaded folder into a temporary one, which is the job's working directory and which it removes
later. What a run leaves must therefore be elsewhere. Data and models may be in the uploaded folder; their
paths stay relative, because the next job of the same run finds them in another temporary folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container
from pathlib import Path, PurePosixPath

from deploy.paths import path_or_name
from deploy.version import versions
from distill.errors import ConfigError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of a job, whose files and environment it names."""
VERSIONS_VARIABLE = "DISTILL_SUBMITTED_WITH"
"""`distill submit` sets it to its own versions, as JSON."""
_UNPACKED = "working_dir_files"
"""The folder into which Ray unpacks uploaded folders."""


def in_uploaded_folder() -> bool:
    """Whether this process is a job's and its working directory is the uploaded folder."""
    return JOB_VARIABLE in os.environ and _UNPACKED in Path.cwd().parts


def require_submitted_versions() -> None:
    """Compare the versions of the machine that submitted this job with those here.

    Raises: ConfigError with both versions.
    """
    if VERSIONS_VARIABLE not in os.environ:
        return
    here = versions()
    for name, theirs in json.loads(os.environ[VERSIONS_VARIABLE]).items():
        if here.get(name) is not None and theirs is not None and here[name] != theirs:
            must = f"be {here[name]}, as on the node of the cluster"
            raise ConfigError(f"{name} of `distill submit`", theirs, must, "install the same version on both")


def require_lasting_path(text: str, name: str) -> None:
    """Raises: ConfigError for the path of something that a run leaves, if it is relative."""
    if not text.startswith(("/", "~")):
        must = (
            "be an absolute path on the cluster, because Ray removes the folder in which a submitted job runs"
        )
        raise ConfigError(name, text, must, f"write it in full, for example ~/{PurePosixPath(text)}")


def uploaded_path_or_name(text: str, known: Container[str], name: str) -> str:
    """Like :func:`deploy.paths.path_or_name`, in a job: a relative path is that of an uploaded file and stays so.

    Raises: ConfigError for a relative path that is not in the uploaded folder.
    """
    if not text or text in known or text.startswith(("~", "/")):
        return path_or_name(text, known, name)
    absolute = path_or_name(text, known, name)
    if absolute == text:  # neither a path that exists nor one that is written as a path
        if is_file_name(text):
            raise not_uploaded(name, text)
        return text
    if not Path(absolute).is_relative_to(Path.cwd()) or not (Path(text).exists() or "*" in text):
        raise not_uploaded(name, text)
    return str(PurePosixPath(text))


def is_file_name(text: str) -> bool:
    """Whether a text can only be a file of rows, because no name of a model or data set ends like one."""
    return PurePosixPath(text).suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")


def not_uploaded(name: str, text: str, reason: str = "") -> ConfigError:
    """The error for a relative path that the job does not have."""
    must = f"be in the folder that is uploaded with the job{f' ({reason})' if reason else ''}"
    remedy = (
        "submit from the folder that contains it, or copy it to the cluster and give its absolute path there"
    )
    return ConfigError(name, text, must, remedy)
