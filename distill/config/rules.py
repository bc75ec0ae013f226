"""What a broken rule of the configuration looks like."""

from __future__ import annotations


class ConfigError(ValueError):
    """A request that cannot be run: says name, rule, value and remedy in one line."""


def rule(name: str, value: object, must: str, remedy: str) -> str:
    """The one form of every configuration error."""
    return f"{name}={value} must {must}; {remedy}"
