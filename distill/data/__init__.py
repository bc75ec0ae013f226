"""From a data set to the prompt table, and from table rows to requests and trajectory rows.

:mod:`~distill.data.rows` reads a data set of any known format (files by :mod:`~distill.data.sources`, columns
by :mod:`~distill.data.formats`, turns by :mod:`~distill.data.conversation`); :mod:`~distill.data.prompts`
turns its rows into the prompt table, by :mod:`~distill.data.render` and :mod:`~distill.data.tokens`;
:mod:`~distill.data.tables` turns draws into requests and trajectory rows. The caller passes the
tokenizer, and this package does not import torch.
"""

from distill.data.conversation import Example, Turn
from distill.data.prompts import (
    PROMPT_SCHEMA,
    PromptFacts,
    build_prompts,
    heldout_rows,
    prompt_facts,
    training_rows,
)
from distill.data.rows import LoadedRows, load_rows
from distill.data.sources import KNOWN_DATA
from distill.data.tables import (
    PromptTable,
    TextCorpus,
    corpus_table,
    read_table,
    reference_corpus,
    sample_seed,
    write_table,
)

__all__ = [
    "KNOWN_DATA",
    "PROMPT_SCHEMA",
    "Example",
    "LoadedRows",
    "PromptFacts",
    "PromptTable",
    "TextCorpus",
    "Turn",
    "build_prompts",
    "corpus_table",
    "heldout_rows",
    "load_rows",
    "prompt_facts",
    "read_table",
    "reference_corpus",
    "sample_seed",
    "training_rows",
    "write_table",
]
