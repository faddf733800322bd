"""What a preparation can be told: every option, its default and its bounds."""

import hashlib
import json
import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_pipeline.storage import redact


class PrepareConfig(BaseModel):
    """Options of `data_pipeline.prepare.prepare`. Unknown keys are an error (`pydantic.ValidationError`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="`ml-100k`, `synthetic[:key=value,...]`, or a file, directory or glob (any fsspec path)"
    )
    out: str = Field(min_length=1, description="directory to create; it must not exist")
    name: str | None = Field(None, description="name of the data set; default: taken from the source")

    format: Literal["auto", "parquet", "csv"] = Field("auto", description="auto: by the file's extension")
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="CSV; default: tab for .tsv, else comma"
    )
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = Field("timestamp", description="null or empty: the row order is the sequence")
    id_type: Literal["auto", "string"] = Field("auto", description="string: keep every id as text (`007` is not `7`)")
    items: str | None = Field(None, description="file of item attributes, joined to the vocabulary on item_column")

    duplicates: Literal["none", "exact", "consecutive"] = Field(
        "none",
        description="drop rows equal in user, item and time (exact), or an item directly after itself (consecutive)",
    )
    min_user_interactions: int = Field(5, ge=1)
    min_item_interactions: int = Field(5, ge=1)

    num_shards: int = Field(8, ge=1, le=100_000, description="users are hashed over so many files")
    row_group_size: int = Field(4096, ge=1, description="users in a Parquet row group, at most")
    seed: int = Field(0, ge=0, description="key of the order of users inside a file")

    num_cpus: int | None = Field(None, ge=1, description="of the local Ray; default: all. Does not change the result")
    rows_per_block: int = Field(1_000_000, ge=1, description="rows a read task aims at. Does not change the result")

    @field_validator("source", "out", "items", mode="before")
    @classmethod
    def _path_to_string(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("out")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/") or value

    @field_validator("time_column")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @model_validator(mode="after")
    def _consistent(self) -> "PrepareConfig":
        named = [column for column in (self.user_column, self.item_column, self.time_column) if column is not None]
        if len(set(named)) != len(named):
            raise ValueError(f"user_column, item_column and time_column must differ, they are {', '.join(named)}")
        if self.duplicates == "exact" and self.time_column is None:
            raise ValueError("duplicates=exact compares times: name a time_column, or use duplicates=consecutive")
        return self

    def recorded(self) -> dict[str, Any]:
        """The options that decide the bytes written, free of credentials: what the manifest keeps."""
        kept = self.model_dump(exclude={"out", "num_cpus", "rows_per_block"})
        return kept | {"source": redact(self.source), "items": self.items and redact(self.items)}

    def hash(self) -> str:
        """sha256 (hex) of `recorded()` as canonical JSON."""
        return hashlib.sha256(json.dumps(self.recorded(), sort_keys=True).encode()).hexdigest()
