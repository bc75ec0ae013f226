"""The archive that a job is sent with: the working directory, and what the job needs that is not in it."""

from __future__ import annotations

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from distill.errors import ConfigError

EXCLUDED = (
    ".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "node_modules", ".pytest_cache", ".ruff_cache",
    ".mypy_cache", ".hypothesis", ".import_linter_cache", ".ipynb_checkpoints", ".tox", "*.egg-info",
    ".env", ".env.*", ".netrc", ".ssh", ".aws", "*.pem", "id_rsa*", "id_ed25519*",
)  # fmt: skip
"""Names that are left out wherever they are. Those of the last line contain credentials."""
EXCLUDED_AT_THE_TOP = ("runs",)
"""Names that are left out directly below the working directory."""
PACKAGES = ("actors", "deploy", "distill", "learner")
"""The packages of this project."""
_SOURCE = Path(__file__).parents[2]
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Every file has this time in the archive, because Ray recognises an archive that it has by its bytes."""
_NUM_SHOWN = 3
_SILENT = logging.Logger("uploads", logging.CRITICAL)
"""Ray would print the names of the files of rules that it reads."""

Files = Mapping[str, Path]
"""Path in the archive -> file on this machine."""


def working_files(root: Path) -> Files:
    """The files below ``root`` that a job gets, without those that .gitignore and .rayignore name.

    Links to folders are not followed, nor are links to files outside of ``root``, which the user need not mean to send.
    """
    return {str(PurePosixPath(path.relative_to(root))): path for path in _walk(root, root, [])}


def with_package(files: Files, root: Path, source: Path = _SOURCE) -> Files:
    """``files`` with this project's packages, unless ``root`` is the folder that they were loaded from.

    Raises: ConfigError when ``root`` has folders of the same names.
    """
    if root.resolve() == source.resolve():
        return files
    for name in PACKAGES:
        if any(path.startswith(f"{name}/") for path in files):
            must = f"contain no folder {name}, because the job gets this project's package of that name"
            raise ConfigError("working directory", root, must, "submit from another folder")
    package: dict[str, Path] = {}
    for name in PACKAGES:
        for path in _walk(source / name, source, []):
            package[str(PurePosixPath(path.relative_to(source)))] = path
    return {**files, **package}


def require_size(files: Files, root: Path, limit: int) -> int:
    """Add up the sizes of the files in bytes.

    Raises: ConfigError when they exceed ``limit``, with the largest entries of the working directory.
    """
    sizes: Counter[str] = Counter()
    for name, path in files.items():
        sizes[name.partition("/")[0]] += path.stat().st_size
    total = sum(sizes.values())
    if total >= limit:
        largest = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.most_common(_NUM_SHOWN))
        must = (
            f"be smaller than {_mib(limit)}, Ray's limit; it has {_mib(total)} before compression ({largest})"
        )
        remedy = "copy large files to the cluster and give their absolute paths, and list them in .rayignore"
        raise ConfigError("working directory", root, must, remedy)
    return total


def write_archive(files: Files, path: Path) -> None:
    """Write the files as a zip that depends on their names and contents only.

    Raises: ConfigError for a name that would leave the folder into which the cluster unpacks the archive.
    """
    for name in files:
        member = PurePosixPath(name)
        if member.is_absolute() or ".." in member.parts or "\\" in name or not member.parts:
            must = "be a path below the working directory"
            raise ConfigError(
                "member of the upload", repr(name), must, "rename the file, or move it into the folder"
            )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name].read_bytes())


def _walk(folder: Path, root: Path, ignored: Sequence[Callable[[Path], bool]]) -> Iterator[Path]:
    ignored = [*ignored, *_ignored_by_files_of(folder)]
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        names = (*EXCLUDED, *EXCLUDED_AT_THE_TOP) if folder == root else EXCLUDED
        if any(fnmatch(entry.name, name) for name in names) or any(ignores(path) for ignores in ignored):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, ignored)
        elif entry.is_file() and (not entry.is_symlink() or path.resolve().is_relative_to(root.resolve())):
            yield path


def _ignored_by_files_of(folder: Path) -> list[Callable[[Path], bool]]:
    """The rules of .gitignore and .rayignore in a folder, as Ray's own uploads read them."""
    if not any((folder / name).is_file() for name in (".gitignore", ".rayignore")):
        return []
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    return list(get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_SILENT))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
