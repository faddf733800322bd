"""64-bit integer columns in 32 bits, where their values lie close enough together: what waits between two stages.

Ids and times rarely span 2³² values within a block, so most of a log takes half the memory, and half the disk where
Ray's object store spills. Nothing is lost: the least value of each narrowed column is in the table's schema.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPAN = 1 << 32
_KEY = b"least"


def narrow(table: pa.Table) -> pa.Table:
    """`table` (no nulls) with uint32 columns in place of int64 ones whose values span less than `SPAN`."""
    least: dict[str, int] = {}
    for place, field in enumerate(table.schema):
        if not pa.types.is_int64(field.type) or not table.num_rows:
            continue
        bounds = pc.min_max(table[field.name])
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if high - low < SPAN:
            least[field.name] = low
            values = (table[field.name].to_numpy() - low).astype(np.uint32)
            table = table.set_column(place, field.name, pa.array(values))
    return table.replace_schema_metadata({_KEY: json.dumps(least)})


def widen(table: pa.Table) -> pa.Table:
    """What `narrow` was given (or slices of it)."""
    for name, low in json.loads(table.schema.metadata[_KEY]).items():
        values = table[name].to_numpy().astype(np.int64) + low
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    return table.replace_schema_metadata(None)
