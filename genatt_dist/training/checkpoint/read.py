"""A complete checkpoint, read: its files checked, the dense state by name, and any rectangle of a table.

Legend: V rows, D columns of a rectangle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import yaml
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import read_bytes, redact
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint import tensors
from genatt_dist.training.checkpoint.files import (
    AMENDED,
    COMPLETE,
    CONFIG,
    DENSE,
    PROGRESS,
    TABLES,
    USE_OLDER,
    inside,
    read_if_there,
    sha256,
)
from genatt_dist.training.checkpoint.progress import Progress

ROWS, STATE = "rows", "optimizer."  # names of tensors in a table's file
_READERS = 4


@dataclass(frozen=True)
class Rectangle:
    """A file with rows first_row … first_row + V − 1 and columns first_column … first_column + D − 1 of a table."""

    file: str
    table: str
    first_row: int
    first_column: int
    num_rows: int
    num_columns: int


@dataclass(frozen=True)
class Checkpoint:
    """files: what COMPLETE vouches for, names and sha256. Every name has been checked to stay inside `path`."""

    path: str
    files: dict[str, str]

    @staticmethod
    def open(path: str) -> Checkpoint:
        """What is at `path`. Raises GenattError when it is unfinished or damaged, or names what may not be read."""
        content = read_if_there(f"{path}/{COMPLETE}")
        if content is None:
            raise GenattError(f"checkpoint {redact(path)} is not complete (no {COMPLETE} in it); name another one")
        try:
            files = json.loads(content)
            if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
                raise ValueError("not a name and a sum of each file")
        except ValueError as error:
            raise GenattError(f"checkpoint {redact(path)}: {COMPLETE} is damaged: {error}; {USE_OLDER}") from None
        for name in files:
            inside(path, name)
        return Checkpoint(path, files)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Raise GenattError naming the first file whose bytes are not those that were written.

        With `parts` ranks each takes its part of the files.
        """
        names = sorted(self.files)[part::parts]
        with ThreadPoolExecutor(_READERS, "sha256") as pool:
            for name, found in zip(names, pool.map(self._sum, names), strict=True):
                expected = self.files[name]
                if found is None:
                    raise GenattError(f"checkpoint {redact(self.path)}: {name} is missing; {USE_OLDER}")
                if found != expected:
                    raise GenattError(
                        f"checkpoint {redact(self.path)}: {name} has sha256 {found[:12]}…, {expected[:12]}… was "
                        f"written; {USE_OLDER}"
                    )

    @cached_property
    def progress(self) -> Progress:
        """Where the run stood when the checkpoint was written."""
        try:
            return Progress(**json.loads(read_bytes(self.file(AMENDED if AMENDED in self.files else PROGRESS))))
        except (ValueError, TypeError) as error:
            raise GenattError(f"checkpoint {redact(self.path)}: cannot read {PROGRESS}: {error}; {USE_OLDER}") from None

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the run that wrote it."""
        return configuration.parse(yaml.safe_load(self.config_text), f"{redact(self.path)}/{CONFIG}")

    @property
    def config_text(self) -> str:
        """The configuration as YAML."""
        return read_bytes(self.file(CONFIG)).decode()

    @cached_property
    def dense_entries(self) -> dict[str, tensors.Entry]:
        """Names, types and shapes of the dense state."""
        return tensors.entries(self.file(DENSE))

    def dense(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The tensors of the dense state by name: `parameter.…`, `buffer.…`, and the moments `exp_avg.…` and so on."""
        path = self.file(DENSE)
        return {name: tensors.read(path, entry) for name, entry in self.dense_entries.items() if wanted(name)}

    def dense_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of one tensor of the dense state."""
        return tensors.read(self.file(DENSE), self.dense_entries[name], first, count)

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """What is here of sharded tables; nothing where all tables were replicated."""
        if TABLES not in self.files:
            return []
        try:
            found = [Rectangle(**told) for told in json.loads(read_bytes(self.file(TABLES)))]
            if not all(type(value) is int and value >= 0 for one in found for value in list(vars(one).values())[2:]):
                raise ValueError("a negative row or column")
        except (ValueError, TypeError) as error:
            raise GenattError(f"checkpoint {redact(self.path)}: cannot read {TABLES}: {error}; {USE_OLDER}") from None
        return found

    def table_shape(self, table: str) -> tuple[int, int]:
        """Rows, the padding row included, and columns of a whole sharded table; (0, 0) where there is no such table."""
        mine = [one for one in self.rectangles if one.table == table]
        rows = max((one.first_row + one.num_rows for one in mine), default=0)
        return rows, max((one.first_column + one.num_columns for one in mine), default=0)

    def read_shard(self, shard: TableShard, with_optimizer: bool = True) -> None:
        """Fill the rows of `shard` (a view of them) the checkpoint has, whichever ranks wrote them, block by block.

        Rows beyond its table stay as they are. Raises GenattError where rows in between are missing, or where the state
        of whole rows was kept for other columns than these.
        """
        rows, columns = shard.rows.shape
        known = max(0, min(rows, self.table_shape(shard.name)[0] - shard.first_row))
        filled = 0
        for one in self.rectangles:
            low = max(shard.first_row, one.first_row)
            high = min(shard.first_row + rows, one.first_row + one.num_rows)
            left = max(shard.first_column, one.first_column)
            right = min(shard.first_column + columns, one.first_column + one.num_columns)
            if one.table == shard.name and low < high and left < right:
                self._copy(one, shard, (low, high), (left, right), with_optimizer)
                filled += (high - low) * (right - left)
        if filled != known * columns:
            raise GenattError(
                f"checkpoint {redact(self.path)} holds {filled // max(1, columns)} of the rows {shard.first_row}.."
                f"{shard.first_row + known - 1} of table {shard.name}; {USE_OLDER}"
            )

    def _copy(
        self,
        one: Rectangle,
        shard: TableShard,
        rows: tuple[int, int],
        columns: tuple[int, int],
        with_optimizer: bool,
    ) -> None:
        path = self.file(one.file)
        stored = tensors.entries(path)
        targets = {ROWS: shard.rows}
        if with_optimizer:
            targets |= {f"{STATE}{name}": value for name, value in shard.optimizer.items()}
        for name, target in targets.items():
            if name not in stored or len(stored[name].shape) != target.ndim:
                raise GenattError(f"checkpoint {redact(self.path)}: {one.file} has no {name} for table {one.table}")
            entry = stored[name]
            by_row = target.ndim == 1 or target.shape[1] != shard.rows.shape[1]
            if by_row and (one.first_column, one.num_columns) != (shard.first_column, shard.rows.shape[1]):
                raise GenattError(
                    f"checkpoint {redact(self.path)}: {name.removeprefix(STATE)} of table {one.table} is one number a "
                    f"row of columns {one.first_column}..{one.first_column + one.num_columns - 1}, this rank has "
                    f"others: go on with the same table.sharding on as many ranks"
                )
            for first, count in tensors.spans(rows[1] - rows[0], entry.row_bytes, rows[0] - one.first_row):
                block = tensors.read(path, entry, first, count)
                begin = one.first_row + first - shard.first_row
                part = target[begin : begin + count]
                if by_row:
                    part.copy_(block)
                else:
                    here = slice(columns[0] - shard.first_column, columns[1] - shard.first_column)
                    there = slice(columns[0] - one.first_column, columns[1] - one.first_column)
                    part[:, here].copy_(block[:, there])

    def file(self, name: str) -> str:
        """Where a file of the checkpoint is. Raises GenattError where COMPLETE does not vouch for it."""
        if name not in self.files:
            raise GenattError(f"checkpoint {redact(self.path)} has no {name}; {USE_OLDER}")
        return inside(self.path, name)

    def _sum(self, name: str) -> str | None:
        try:
            return sha256(inside(self.path, name))
        except GenattError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
