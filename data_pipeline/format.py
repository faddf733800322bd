"""What is on disk after a preparation: sequence shards, vocabulary and manifest, and how to read and check them.

shards/part-00000.parquet   one row a user: user_id, item_ids list<int32> (1..num_items), timestamps list<int64>, oldest
                            first; a shard no user hashes to has no file
vocabulary/items.parquet    one row an item: item_id, dense_id, count, train_count, then the attributes
manifest.json               this module's `Manifest`, written last
"""

import hashlib
import io
import json
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_pipeline.errors import GenattError
from data_pipeline.splits import LeaveOneOut
from data_pipeline.storage import filesystem, one_line, redact

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary/items.parquet"
MEND = "prepare it again into another --out"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WrittenFile(_Part):
    """A file of the directory: its path inside it, its size, and the sha256 (hex) of its content."""

    path: str
    bytes: int
    sha256: str


class ShardFile(WrittenFile):
    """A shard, with how many users (rows) and interactions it holds."""

    users: int
    interactions: int


class RawFile(_Part):
    """A file the data came from: its path inside the source, and its size."""

    path: str
    bytes: int


class LedgerEntry(_Part):
    """What one stage did to the number of rows."""

    stage: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> "LedgerEntry":
        if self.rows_in - sum(self.dropped.values()) != self.rows_out:
            raise ValueError(f"stage {self.stage}: {self.rows_in} rows in, {self.dropped} dropped, {self.rows_out} out")
        return self


class Manifest(_Part):
    """The table of contents. `max_item_id` is `num_items`: dense ids have no gaps."""

    schema_version: Literal[1] = 1
    name: str
    num_users: int
    num_items: int
    num_interactions: int
    split: LeaveOneOut
    files: tuple[ShardFile, ...]
    vocabulary: WrittenFile
    source: tuple[RawFile, ...]
    config: dict[str, Any]
    config_hash: str
    ledger: tuple[LedgerEntry, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> "Manifest":
        for before, after in zip(self.ledger, self.ledger[1:], strict=False):
            if before.rows_out != after.rows_in:
                raise ValueError(f"{before.rows_out} rows left {before.stage}, {after.rows_in} came to {after.stage}")
        users, interactions = sum(file.users for file in self.files), sum(file.interactions for file in self.files)
        if users != self.num_users or not interactions == self.num_interactions == self.ledger[-1].rows_out:
            raise ValueError(f"files hold {users} users and {interactions} interactions, the totals say otherwise")
        return self

    def to_json(self) -> bytes:
        """The content of manifest.json: the same bytes for the same manifest."""
        return (json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n").encode()


def shard_schema(user_type: pa.DataType) -> pa.Schema:
    """Schema of a shard; `user_type` is int64 or string."""
    return pa.schema([("user_id", user_type), ("item_ids", pa.list_(pa.int32())), ("timestamps", pa.list_(pa.int64()))])


def parquet_bytes(table: pa.Table, row_group_size: int) -> bytes:
    """`table` as a Parquet file; every setting that changes bytes is written out."""
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        sink,
        row_group_size=row_group_size,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        store_schema=True,
    )
    return sink.getvalue()


def load_manifest(path: str) -> Manifest:
    """The manifest of the prepared directory `path`.

    Raises
    ------
    GenattError
        There is none, it is damaged, or its schema version is not `SCHEMA_VERSION`.
    """
    try:
        content = json.loads(_read(path, MANIFEST))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise GenattError(f"{redact(path)}: schema version {version}, this program reads {SCHEMA_VERSION}: {MEND}")
        return Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise GenattError(
            f"{redact(path)} is no prepared data set (no {MANIFEST} there): run `genatt prepare` first"
        ) from error
    except (ValueError, AttributeError, ValidationError) as error:
        raise GenattError(f"{redact(path)}/{MANIFEST} is damaged: {one_line(error)}: {MEND}") from error


def manifest_hash(path: str) -> str:
    """sha256 (hex) of the bytes of manifest.json: names the prepared data in checkpoints and reports."""
    load_manifest(path)
    return hashlib.sha256(_read(path, MANIFEST)).hexdigest()


def verify(path: str, manifest: Manifest) -> None:
    """Checks size and sha256 of every file of `manifest`; `GenattError` names the first that differs."""
    for file in (*manifest.files, manifest.vocabulary):
        try:
            content = _read(path, file.path)
        except FileNotFoundError as error:
            raise GenattError(f"{redact(path)}/{file.path} is missing: {MEND}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise GenattError(
                f"{redact(path)}/{file.path} is damaged: expected sha256 {file.sha256} ({file.bytes} bytes), "
                f"found {found} ({len(content)} bytes): {MEND}"
            )


def read_shard(path: str, file: ShardFile) -> pa.Table:
    """A shard's rows: user_id, item_ids list<int32>, timestamps list<int64>."""
    return _read_parquet(path, file.path)


def read_vocabulary(path: str, manifest: Manifest) -> pa.Table:
    """The vocabulary's rows by dense_id: row i is item i + 1."""
    return _read_parquet(path, manifest.vocabulary.path)


def _read(path: str, name: str) -> bytes:
    fs, root = filesystem(path)
    return bytes(fs.cat_file(f"{root}/{name}"))


def _read_parquet(path: str, name: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(_read(path, name)))
    except (OSError, pa.ArrowException) as error:
        raise GenattError(f"cannot read {redact(path)}/{name}: {one_line(error)}: {MEND}") from error
