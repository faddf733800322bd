"""Writing checkpoints while training: what is collected from the ranks, and the thread that writes it.

Collecting is collective and short: ZeRO's parts are gathered on the CPU of rank 0. In the background a copy of this
rank's tables is made besides (rows and optimizer state, in this rank's memory until it is written) and training goes
on; in the foreground the tables are written from where they lie, block by block.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpoint.write import PARTS_SECONDS, Whole, seal, write_part
from genatt_dist.training.engine import Engine

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable

_WRITE_SECONDS = 3 * PARTS_SECONDS  # a write that takes longer hangs
_GRACE_SECONDS = 10.0  # given to a write in flight when training failed


class Saver:
    """A context in which checkpoints are saved; at its end the last one is complete."""

    def __init__(
        self, store: Store, config: RunConfig, engine: Engine, table: ShardedTable | None, device: torch.device
    ) -> None:
        self._store, self._config, self._engine, self._table, self._device = store, config, engine, table, device
        self._rank = dist.get_rank()
        self._num_parts = dist.get_world_size() if table else 1
        self._thread: threading.Thread | None = None
        self._step = -1
        self._failure: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_GRACE_SECONDS)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, or begin to; a former one is complete before. Collective.

        Raises GenattError when this checkpoint, or in the background the former one, cannot be written.
        """
        self.wait()
        self._step = progress.step
        token = self._begin()
        dense = self._engine.state(keep=self._rank == 0)
        shards = self._table.shards if self._table else []
        progress = replace(progress, best_metrics=dict(progress.best_metrics))
        whole = Whole(dense, progress, configuration.dump(self._config)) if self._rank == 0 else None
        if self._config.training.checkpoint.background:
            if self._rank < self._num_parts:
                copies = [_copy(shard) for shard in shards]
                self._thread = threading.Thread(
                    target=self._write, args=(token, copies, whole), name="checkpoint", daemon=True
                )
                self._thread.start()
            return
        self._write(token, shards, whole)
        self.check()
        dist.barrier()

    def check(self) -> None:
        """Raise GenattError when a write has failed meanwhile."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise GenattError(
                f"cannot write a checkpoint of step {self._step} into {redact(self._store.root)}: "
                f"{' '.join(str(failure).split())}; free some space or mend its permissions, then go on by --resume"
            ) from failure

    def wait(self) -> None:
        """Return when nothing is being written any more; raises as `check` does."""
        if self._thread is not None:
            self._thread.join(_WRITE_SECONDS)
            if self._thread.is_alive():
                raise GenattError(
                    f"the checkpoint of step {self._step} is not written after {_WRITE_SECONDS:.0f} s: look into "
                    f"{redact(self._store.root)}"
                )
            self._thread = None
        self.check()

    def _begin(self) -> int:
        """Clear away what a killed save left; returns what tells this save from it. Collective."""
        token = torch.zeros((), dtype=torch.int64, device=self._device)
        if self._rank == 0:
            if self._step in self._store.complete():
                raise GenattError(f"{redact(self._store.path(self._step))} is complete already: remove it, then go on")
            self._store.remove_unfinished()
            token.fill_(secrets.randbits(62))
        dist.broadcast(token, 0)
        return int(token)

    def _write(self, token: int, shards: list[TableShard], whole: Whole | None) -> None:
        path = self._store.path(self._step)
        try:
            if self._rank < self._num_parts:
                write_part(path, self._rank, token, shards)
            if whole is not None:
                seal(path, token, self._num_parts, whole)
                self._store.keep(self._config.training.checkpoint, whole.progress.best_step)
        except Exception as error:  # also in a thread: told where training goes on
            self._failure = error


def _copy(shard: TableShard) -> TableShard:
    state = {name: value.detach().to("cpu", copy=True) for name, value in shard.optimizer.items()}
    return replace(shard, rows=shard.rows.detach().to("cpu", copy=True), optimizer=state)
