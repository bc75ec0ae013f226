"""Removes credentials from text before it is printed, written to a run folder or shown in a report.

Credentials reach such text through errors of libraries, which quote addresses and headers, and through settings that
are addresses themselves. Two kinds are recognised: values of environment variables whose names say that they are
secret, and text of a form that only credentials have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_WORDS = frozenset(
    [
        "TOKEN",
        "KEY",
        "APIKEY",
        "PASSWORD",
        "PASSWD",
        "PASSPHRASE",
        "SECRET",
        "SECRETS",
        "CREDENTIAL",
        "CREDENTIALS",
    ]
)
_PLACE_WORDS = frozenset(["FILE", "PATH", "DIR", "FOLDER"])
"""A variable such as RAY_AUTH_TOKEN_PATH says where a secret is, which helps a reader."""
_ACCOUNTS = re.compile(r"(WANDB|MLFLOW|TRACKIO|HF|HUGGING_FACE|DATABRICKS|AWS).*USERNAME")
_SHORTEST = 6
"""A shorter value, such as ``none``, would be masked inside ordinary words."""

_USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"<>]+(?=@)")
_FORMS = (
    re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat)_\w{16,}"),
    re.compile(r"(?<=Bearer )[\w.~+/=-]{8,}"),
    re.compile(r"(?<=[?&])((?:[\w-]*(?:token|key|password|secret|signature))=)[^&\s'\"<>]+", re.IGNORECASE),
)
_PASSWORD_OF_URL = re.compile(r"(?:https?://[^/\s@]+|://[^/\s@:]*:[^/\s@]+)@")


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name contains a credential."""
    words = set(name.upper().split("_"))
    return bool((words & _SECRET_WORDS and not words & _PLACE_WORDS) or _ACCOUNTS.fullmatch(name.upper()))


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace credentials in a text by ``***``; a text without any is returned unchanged."""
    secrets = {
        value for name, value in environment.items() if len(value) >= _SHORTEST and is_secret_name(name)
    }
    for value in sorted(secrets, key=len, reverse=True):  # one can be a part of another
        text = text.replace(value, MASK)
    text = _USER_OF_URL.sub(MASK, text)
    for form in _FORMS:
        text = form.sub(lambda found: (found[1] if found.lastindex else "") + MASK, text)
    return text


def redacted_values(value: Any) -> Any:
    """Replace credentials in all texts of a JSON value."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: redacted_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return value


def contains_credentials(text: str) -> bool:
    """Return whether a text has the form of a credential, or is an address with one, whatever the environment."""
    return _PASSWORD_OF_URL.search(text) is not None or any(form.search(text) for form in _FORMS)
