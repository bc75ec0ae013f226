"""Makes text that others wrote safe to print on a terminal.

A model can write anything, terminal control sequences included, and so can the author of a data set or a checkpoint,
which errors quote. Such text passes through :func:`strip_control` before it becomes part of a report, and through
:func:`printable` or :func:`one_line`, which also mask credentials, before it is printed.
"""

from __future__ import annotations

import re
import unicodedata

from distill.redaction import redacted

# Whole sequences, so that their parameters go too: CSI; OSC, DCS, SOS, PM and APC up to their
# terminator; other escapes. The rest of an unfinished sequence is harmless without its ESC.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-Z\\^-~]"
)
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; all others (direction marks, tags) can deceive a reader."""


def strip_control(text: str) -> str:
    """Remove everything that moves the cursor, colours, retitles, reorders or hides; keep lines and tabs."""
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return "".join(_visible(character) for character in text)


def printable(text: str) -> str:
    """Return a text as a terminal may show it: without control sequences and credentials."""
    return redacted(strip_control(text))


def one_line(text: str) -> str:
    """Return a printable text in one line, so that no part of it can pass for another message."""
    return " ".join(printable(text).split("\n"))


def _visible(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    category = unicodedata.category(character)
    if category in ("Zl", "Zp"):
        return "\n"
    if category == "Cs":  # half of a surrogate pair, which cannot be encoded
        return "\ufffd"
    return "" if category in ("Cc", "Cf") else character
