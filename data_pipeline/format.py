"""What is on disk after a preparation: sequence shards, vocabulary and manifest, and how to read and check them.

shards/part-00000.parquet   one row a user: user_id, item_ids list<int32> (1..num_items), timestamps list<int64>, oldest
                            first, and weights list<float32> where events have them; row groups of
                            `Manifest.row_group_size` users; a shard no user hashes to has no file
index/part-00000.parquet    one row a user of that shard, in its order: length, train, valid, test int32 (see `splits`):
                            all that has to be known to plan an epoch without reading a sequence
vocabulary/items.parquet    one row an item, row i is item i + 1: item_id, dense_id, count, train_count, the attributes
vocabulary/buckets.parquet  with hash buckets: item_id, dense_id, count of every item seen, several to a dense id
manifest.json               this module's `Manifest`, written last
"""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_pipeline.errors import GenattError
from data_pipeline.splits import SplitRule
from data_pipeline.storage import one_line, read_bytes, redact

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SHARD = "shards/part-{:05d}.parquet"
INDEX = "index/part-{:05d}.parquet"
VOCABULARY = "vocabulary/items.parquet"
BUCKETS = "vocabulary/buckets.parquet"
INDEX_SCHEMA = pa.schema([(name, pa.int32()) for name in ("length", "train", "valid", "test")])
TIMES_ENCODING = {"timestamps.list.element": "DELTA_BINARY_PACKED"}  # a user's times rise
MEND = "prepare it again into another --out"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WrittenFile(_Part):
    """A file of the directory: its path inside it, its size, and the sha256 (hex) of its content."""

    path: str
    bytes: int
    sha256: str


class ShardFile(WrittenFile):
    """A shard, with its number among the shards, its index, and how many users (rows) and interactions it holds."""

    shard: int
    users: int
    interactions: int
    index: WrittenFile


class RawFile(_Part):
    """A file the data came from: its path inside the source, and its size."""

    path: str
    bytes: int


class LedgerEntry(_Part):
    """What one stage did to the number of rows. added: rows of the parent version that joined them."""

    stage: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int] = {}
    added: int = 0

    @model_validator(mode="after")
    def _adds_up(self) -> "LedgerEntry":
        if self.rows_in + self.added - sum(self.dropped.values()) != self.rows_out:
            raise ValueError(
                f"stage {self.stage}: {self.rows_in} rows in and {self.added} added, {self.dropped} dropped, "
                f"{self.rows_out} out"
            )
        return self


class Manifest(_Part):
    """The table of contents. `num_items` is the largest dense id: there are no gaps.

    num_shards: users are hashed over so many shards, of which those with users have a file. out_of_vocabulary: the
    dense id all rare items share, if they do. pruned_files: of the source, outside the time range by their paths, so
    that nobody counted their rows. parent: `manifest_hash` of the version this one adds to; ancestors: of
    all versions it comes from, oldest first, the parent last. drift: what frozen admission meant for the rows added
    (see `append`).
    """

    schema_version: Literal[2] = 2
    name: str
    num_users: int
    num_items: int
    num_interactions: int
    num_shards: int
    row_group_size: int
    split: SplitRule
    time_unit: str | None = None
    out_of_vocabulary: int | None = None
    files: tuple[ShardFile, ...]
    vocabulary: WrittenFile
    buckets: WrittenFile | None = None
    source: tuple[RawFile, ...]
    config: dict[str, Any]
    config_hash: str
    pruned_files: int = 0
    parent: str | None = None
    ancestors: tuple[str, ...] = ()
    drift: dict[str, int] | None = None
    ledger: tuple[LedgerEntry, ...]

    @property
    def lineage(self) -> frozenset[str]:
        """`manifest_hash` of every version whose users, items and dense ids are in this one."""
        return frozenset((*self.ancestors, *([self.parent] if self.parent else [])))

    @property
    def written(self) -> tuple[WrittenFile, ...]:
        """Every file but the manifest."""
        files = [part for file in self.files for part in (file, file.index)]
        return (*files, self.vocabulary, *((self.buckets,) if self.buckets else ()))

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
        content = self.model_dump(exclude=None if self.ancestors else {"ancestors"})  # most have none: no word of it
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def shard_schema(user_type: pa.DataType, weighted: bool = False) -> pa.Schema:
    """Schema of a shard; `user_type` is int64 or string."""
    fields = [("user_id", user_type), ("item_ids", pa.list_(pa.int32())), ("timestamps", pa.list_(pa.int64()))]
    return pa.schema([*fields, ("weights", pa.list_(pa.float32()))] if weighted else fields)


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
        use_dictionary=False,  # ids of items repeat too little, ids of users never: half the time, two thirds the bytes
        column_encoding=TIMES_ENCODING if "timestamps" in table.column_names else None,
        write_statistics=True,
        write_page_checksum=True,
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


def verify(path: str, manifest: Manifest, advance: Callable[[int], None] = lambda _: None) -> None:
    """Checks size and sha256 of every file of `manifest`; `GenattError` names the first that differs.

    `advance` is told the bytes of each file that is well.
    """
    for file in manifest.written:
        advance(len(read_intact(path, file)))


def read_intact(path: str, file: WrittenFile) -> bytes:
    """The content of a file; `GenattError` if it is missing or not what the manifest says."""
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
    return content


def read_shard(path: str, file: ShardFile) -> pa.Table:
    """A shard's rows: user_id, item_ids list<int32>, timestamps list<int64>."""
    return _read_parquet(path, file.path)


def read_index(path: str, file: ShardFile) -> pa.Table:
    """length, train, valid, test (int32) of each user of a shard, in its order."""
    return _read_parquet(path, file.index.path)


def read_vocabulary(path: str, manifest: Manifest, columns: list[str] | None = None) -> pa.Table:
    """The vocabulary's rows by dense_id: row i is item i + 1."""
    return _read_parquet(path, manifest.vocabulary.path, columns)


def _read(path: str, name: str) -> bytes:
    """`FileNotFoundError` if there is none, `GenattError` for whatever else fails."""
    try:
        return read_bytes(f"{path.rstrip('/')}/{name}")
    except GenattError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise


def _read_parquet(path: str, name: str, columns: list[str] | None = None) -> pa.Table:
    try:
        content = pa.BufferReader(_read(path, name))
        return pq.read_table(content, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise GenattError(f"cannot read {redact(path)}/{name}: {one_line(error)}: {MEND}") from error
