"""The paths that a user gives, in settings and as arguments.

``~`` is the home folder, and a relative path counts from the working directory, on the command line as in a file.
Each path is made absolute once, where it comes in; all other code uses it as it is.
"""

from __future__ import annotations

import glob
from collections.abc import Container
from pathlib import Path

from distill.errors import ConfigError


def absolute_path(text: str, name: str) -> Path:
    """Make a path absolute. ``name``: the setting or argument, for errors.

    Raises: ConfigError when it begins with the home folder of a user that does not exist.
    """
    path = Path(text)
    try:
        path = path.expanduser() if text.startswith("~") else path  # Path("./~") is ~ too
    except RuntimeError:
        remedy = f"write the folder in full, or ./{text} if its name begins with ~"
        raise ConfigError(name, text, "begin with the home folder of a user that exists", remedy) from None
    path = path.absolute()
    if ".." not in path.parts:
        return path  # keeps symbolic links, such as those of the hub's cache, whose targets have no endings
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def path_or_name(text: str, known: Container[str], name: str) -> str:
    """Make ``text`` absolute if it is a path; a name or a hub id is returned unchanged.

    A path exists, is a pattern, or begins with ``~``, ``/``, ``./`` or ``../``. ``known``: names that can be
    fetched, which are never paths. ``name``: the setting or argument, for errors.

    Raises: ConfigError.
    """
    if not text or text in known:
        return text
    if text.startswith(("~", "/", "./", "../")) or Path(text).exists() or glob.has_magic(text):
        return str(absolute_path(text, name))
    return text
