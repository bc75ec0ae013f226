"""The environment of the templates in ``templates``, for every form of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.report.model import piece_text


def environment(filters: Mapping[str, Callable[..., Any]], *blocks: type, **options: Any) -> Environment:
    """Make an environment. ``blocks``: classes of the model, each of which is a test with its name in lower case."""
    made = Environment(
        loader=PackageLoader("deploy.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    made.filters |= {"piece_text": piece_text, **filters}
    made.tests |= {
        block.__name__.lower(): lambda value, block=block: isinstance(value, block) for block in blocks
    }
    return made
