"""Column names and table schemas. The only file in which a column name is a literal."""

from __future__ import annotations

import pyarrow as pa

from schemas.errors import DataError

# items and interactions
ITEM_ID = "item_id"
USER_ID = "user_id"
TIMESTAMP = "timestamp"  # int64, milliseconds since 1970, UTC
SEQUENCE = "sequence"  # int64, order within one timestamp
EVENT = "event"
LABEL = "label"
AVAILABLE = "available"
UPDATED_AT = "updated_at"
RESERVED_ITEM_COLUMNS = (ITEM_ID, AVAILABLE, UPDATED_AT)

# quarantine
FILE = "file"
ROW = "row"  # 1-based, the header not counted
REASON = "reason"
RAW = "raw"  # the rejected row as JSON

# item_embeddings and snapshots
KEY = "key"
TEXT = "text"
EMBEDDING = "embedding"
N_TOKENS = "n_tokens"
TRUNCATED = "truncated"
CREATED_AT = "created_at"
RUN_ID = "run_id"
FINGERPRINT = "fingerprint"

# user vectors
HISTORY = "history"  # digest of the events that the vector was made of

# per-user ranks of an evaluation
TARGET = "target"
ABOVE = "above"  # candidates scored strictly higher than the target; -1 is a miss
TIES = "ties"  # other candidates with the target's score

INTERACTIONS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(TIMESTAMP, pa.int64(), nullable=False),
        pa.field(SEQUENCE, pa.int64()),
        pa.field(EVENT, pa.string()),
        pa.field(LABEL, pa.float64()),
    ]
)
QUARANTINE = pa.schema(
    [
        pa.field(FILE, pa.string(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field(REASON, pa.string(), nullable=False),
        pa.field(RAW, pa.string(), nullable=False),
    ]
)
# the file columns of the Delta table; its partitions FINGERPRINT and FILE live in the log
EMBEDDINGS = pa.schema(
    [
        pa.field(KEY, pa.binary(), nullable=False),
        pa.field(EMBEDDING, pa.binary(), nullable=False),
        pa.field(N_TOKENS, pa.int32(), nullable=False),
        pa.field(TRUNCATED, pa.bool_(), nullable=False),
        pa.field(CREATED_AT, pa.int64(), nullable=False),
        pa.field(RUN_ID, pa.string(), nullable=False),
    ]
)
SNAPSHOT_ITEMS = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(KEY, pa.binary(), nullable=False),
        pa.field(AVAILABLE, pa.bool_(), nullable=False),
    ]
)
# items of the catalog that a snapshot leaves out; without a key: the template gave no text
LEFT_OUT = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(KEY, pa.binary()),
        pa.field(REASON, pa.string(), nullable=False),
    ]
)
# the last event of each user that a tuning of the item tower saw
CUTOFF = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(TIMESTAMP, pa.int64(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
    ]
)

USER_VECTORS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(HISTORY, pa.binary(), nullable=False),
        pa.field(EMBEDDING, pa.binary(), nullable=False),
    ]
)

RANKS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(TARGET, pa.string(), nullable=False),
        pa.field(ABOVE, pa.int64(), nullable=False),
        pa.field(TIES, pa.int64(), nullable=False),
    ]
)


def check(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """Return the table cast to the schema's columns, in its order.

    Raises DataError, naming ``source`` and the column, when a required column is missing, has another
    type, or holds nulls.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise DataError(f"{source}: column {field.name!r} is missing; found {table.column_names}")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        try:
            column = column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{source}: column {field.name!r} is {column.type}, expected {field.type}: {error}"
            ) from error
        if not field.nullable and column.null_count:
            raise DataError(f"{source}: column {field.name!r} holds {column.null_count} nulls")
        columns.append(column)
    return pa.table(columns, schema=schema)
