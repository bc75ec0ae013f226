"""The few prompts whose answers people read: decoded greedily, because a sample shows the luck of one draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distill.data import read_table
from distill.interfaces import Generator


@dataclass(frozen=True)
class ShownPrompts:
    """The prompts of a table, in its order."""

    prompt_tokens: list[list[int]]
    max_new_tokens: int

    @classmethod
    def read(cls, path: str | Path, max_new_tokens: int) -> Self:
        """Read the Parquet file of a prompt table."""
        return cls(read_table(path)["prompt_tokens"].to_pylist(), max_new_tokens)

    async def answers(self, generator: Generator) -> list[list[int]]:
        """Token ids of the answers; an answer that the limit cut lacks its stop token."""
        if not self.prompt_tokens:
            return []
        return await generator.greedy(self.prompt_tokens, self.max_new_tokens)
