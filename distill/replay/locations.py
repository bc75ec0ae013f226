"""What :mod:`distill.replay.segments` believes of a location in a message, and of the bytes there: nothing unchecked."""

from __future__ import annotations

import pyarrow as pa

from distill.errors import DistillError
from distill.files import NOT_AS_WRITTEN, is_plain_name
from distill.interfaces import Location
from distill.schema import hidden_width, trajectory_schema


class ForeignLocation(DistillError, ValueError):
    """A location in a message that names no place in a segment."""

    code = "foreign_location"


def require_segment_name(name: object) -> None:
    """Raises: ForeignLocation for a name that leads out of the folders of segments."""
    if not (is_plain_name(name) and str(name).endswith(".arrow")):
        must = "be the name of a file in the folder of segments, such as rollout-0.0-0.arrow"
        raise ForeignLocation(
            "segment", repr(name), must, "find who sent it, because no writer makes such a name"
        )


def require_location(location: Location) -> None:
    """Raises: ForeignLocation."""
    require_segment_name(location.segment)
    for name in ("offset", "num_bytes"):
        value = getattr(location, name)
        if type(value) is not int or value < (name == "num_bytes"):
            raise ForeignLocation(
                f"location.{name}",
                repr(value),
                "be a number of bytes",
                "find who sent it, because no writer makes it",
            )


def schema_in(file: pa.Buffer) -> pa.Schema | None:
    """Return the schema at the begin of a segment file; None when it is not exactly that of a row.

    A column of another type would have the bytes of its rows read as other numbers.
    """
    try:
        found = pa.ipc.read_schema(file)
        expected = trajectory_schema(hidden_width(found))
        return found if found.equals(expected, check_metadata=True) else None
    except (pa.ArrowException, OSError, EOFError, *NOT_AS_WRITTEN):
        return None


def row_in(message: pa.Buffer, schema: pa.Schema) -> tuple[pa.RecordBatch | None, str | None]:
    """Return the row in a message and its trajectory id; None twice when the bytes are not one row of that schema.

    Arrow trusts a message, so that wrong offsets in one would make it read outside of the file.
    """
    try:
        row = pa.ipc.read_record_batch(message, schema)
        row.validate(full=True)
        if row.num_rows == 1:
            return row, row.column("trajectory_id")[0].as_py()
    except (pa.ArrowException, OSError, EOFError, *NOT_AS_WRITTEN):
        pass
    return None, None
