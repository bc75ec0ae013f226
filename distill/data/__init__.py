"""From a data set to the prompt table, and from table rows to requests and trajectory rows.

:mod:`~distill.data.rows` reads a data set of any known format; :mod:`~distill.data.prompts`
turns its rows into the prompt table, the only place where text becomes tokens;
:mod:`~distill.data.tables` turns draws into requests and trajectory rows. The caller passes the
tokenizer, and this package does not import torch.
"""

from distill.data.prompts import (
    PROMPT_SCHEMA,
    build_prompts,
    heldout_rows,
    num_skipped_prompts,
    training_rows,
)
from distill.data.rows import KNOWN_DATA, Example, Turn, load_rows
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
    "PromptTable",
    "TextCorpus",
    "Turn",
    "build_prompts",
    "corpus_table",
    "heldout_rows",
    "load_rows",
    "num_skipped_prompts",
    "read_table",
    "reference_corpus",
    "sample_seed",
    "training_rows",
    "write_table",
]
