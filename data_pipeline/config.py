"""What a preparation can be told: every option, its default and its bounds."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_pipeline.splits import LeaveOneOut, SplitRule, parse_split
from data_pipeline.storage import redact

PATHS = ("source", "out", "items", "append_to")

MOST = (1 << 31) - 1  # dense ids are 32-bit integers
HEAVIEST = 1e38  # weights are 32-bit floats


class PrepareConfig(BaseModel):
    """Options of `data_pipeline.prepare.prepare`. Unknown keys are an error (`pydantic.ValidationError`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    source: str = Field(
        description="a known set (`ml-100k` …), `synthetic[:key=value,...]`, or a file, directory or glob (any fsspec "
        "path)"
    )
    out: str = Field(min_length=1, description="directory to create; it must not exist")
    name: str | None = Field(None, description="name of the data set; default: taken from the source")

    format: Literal["auto", "parquet", "csv", "jsonl"] = Field("auto", description="auto: by the file's extension")
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="CSV; default: tab for .tsv, else comma"
    )
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = Field("timestamp", description="null or empty: the row order is the sequence")
    id_type: Literal["auto", "string"] = Field("auto", description="string: keep every id as text (`007` is not `7`)")
    items: str | None = Field(None, description="file of item attributes, joined to the vocabulary on item_column")

    time_unit: Literal["auto", "s", "ms", "us", "ns"] = Field(
        "auto", description="of numeric times; auto: by their magnitude, the same in all files"
    )
    time_from: int | str | None = Field(
        None, description="keep rows from this time on: a number in the column's unit, or an ISO date"
    )
    time_to: int | str | None = Field(None, description="keep rows before this time")
    event_column: str | None = Field(None, description="column of event types, weighted by event_weights")
    event_weights: dict[str, float] | None = Field(
        None, description="weight of each event type; rows of types not listed, or of weight 0, are dropped"
    )

    duplicates: Literal["none", "exact", "consecutive"] = Field(
        "none",
        description="drop rows equal in user, item and time (exact), or an item directly after itself (consecutive)",
    )
    min_user_interactions: int = Field(5, ge=1)
    min_item_interactions: int = Field(5, ge=1)

    min_count: int = Field(1, ge=1, description="rows an item needs to get an id of its own, after the k-core")
    out_of_vocabulary: Literal["drop", "bucket"] = Field(
        "drop", description="rows of items below min_count: drop them, or give them one id for all"
    )
    hash_buckets: int | None = Field(
        None, ge=1, le=MOST, description="open catalogue: an item's id is its hash in 1..hash_buckets, known or not"
    )
    max_history: int | None = Field(None, ge=1, description="keep a user's newest interactions only")
    split: SplitRule = Field(
        LeaveOneOut(), description="leave_one_out, time:VALID_FROM,TEST_FROM or users:VALID_SHARE,TEST_SHARE"
    )

    num_shards: int | None = Field(
        None, ge=1, le=4096, description="users are hashed over so many files; default: by the number of rows"
    )
    row_group_size: int = Field(1024, ge=1, le=MOST, description="users in a Parquet row group")
    seed: int = Field(0, ge=0, le=MOST, description="key of the order of users inside a file")

    num_cpus: int | None = Field(None, ge=1, description="of the local Ray; default: all. Does not change the result")
    rows_per_block: int = Field(
        1_000_000, ge=1, le=MOST, description="rows a read task aims at. Does not change the result"
    )
    object_store_bytes: int | None = Field(
        None, ge=1 << 27, description="memory of the local Ray's object store; beyond it, blocks go to disk"
    )
    append_to: str | None = Field(None, description="a prepared directory that the source's rows are added to")

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _path_to_string(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("out")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/") or value

    @field_validator("split", mode="before")
    @classmethod
    def _split_of_text(cls, value: Any) -> Any:
        return parse_split(value) if isinstance(value, str) else value

    @field_validator("time_column")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("event_weights", mode="before")
    @classmethod
    def _events_are_text(cls, value: Any) -> Any:
        """Event types that are numbers are read as text, so YAML may write them as numbers."""
        if not isinstance(value, dict):
            return value
        return {str(event) if type(event) is int else event: weight for event, weight in value.items()}

    @field_validator("event_weights")
    @classmethod
    def _weights_are_sizes(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for event, weight in (value or {}).items():
            if not (math.isfinite(weight) and 0 <= weight <= HEAVIEST):
                raise ValueError(f"{event}={weight:g}: a weight is a number from 0 (drop these rows) to {HEAVIEST:g}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "PrepareConfig":
        columns = (self.user_column, self.item_column, self.time_column, self.event_column)
        named = [column for column in columns if column is not None]
        if len(set(named)) != len(named):
            raise ValueError(
                f"user_column, item_column, time_column and event_column must differ, they are {', '.join(named)}"
            )
        if (self.event_column is None) != (self.event_weights is None):
            raise ValueError("event_column and event_weights go together: give both or neither")
        if self.event_weights is not None and not any(weight > 0 for weight in self.event_weights.values()):
            raise ValueError("event_weights must hold a weight above 0")
        if self.time_column is None and (self.time_from is not None or self.time_to is not None):
            raise ValueError("time_from and time_to need a time_column")
        if self.hash_buckets is not None and (self.min_count > 1 or self.out_of_vocabulary == "bucket"):
            raise ValueError("hash_buckets gives every item an id: leave min_count and out_of_vocabulary alone")
        if self.duplicates == "exact" and self.time_column is None:
            raise ValueError("duplicates=exact compares times: name a time_column, or use duplicates=consecutive")
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redact(value) if name in PATHS and isinstance(value, str) else value

    def recorded(self) -> dict[str, Any]:
        """The options that decide the bytes written, free of credentials: what the manifest keeps."""
        kept = self.model_dump(exclude={"out", "num_cpus", "rows_per_block", "object_store_bytes", "append_to"})
        return kept | {"source": redact(self.source), "items": self.items and redact(self.items)}

    def hash(self) -> str:
        """sha256 (hex) of `recorded()` as canonical JSON."""
        return hashlib.sha256(json.dumps(self.recorded(), sort_keys=True).encode()).hexdigest()
