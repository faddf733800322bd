"""Raw files to checked columns: what there is, before any work starts (`plan`), and the rows (`read_chunk`).

A row read is `user_id` (int64 or string), `item_id` (int64 or string), `timestamp` int64 and `position` int64, its
place in the whole source; with an event column also `event` string. Ids and times are free of nulls, or there is a
`GenattError` that names file, column and row.
"""

from data_pipeline.readers.checks import missing_column
from data_pipeline.readers.columns import Kinds
from data_pipeline.readers.plan import Chunk, Plan, plan
from data_pipeline.readers.rows import FILE_STRIDE, read_chunk, read_table
from data_pipeline.readers.times import in_unit

__all__ = [
    "FILE_STRIDE",
    "Chunk",
    "Kinds",
    "Plan",
    "in_unit",
    "missing_column",
    "plan",
    "read_chunk",
    "read_table",
]
