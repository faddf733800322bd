"""Writing checkpoints while training: what is collected from the ranks, and the thread that writes it.

Collecting is collective and short: ZeRO's parts are gathered on the CPU of rank 0. In the background a copy of this
rank's tables is made besides (rows and optimizer state, in this rank's memory until it is written) and training goes
on; in the foreground the tables are written from where they lie, block by block. What holds a number that is none is
never written: each rank looks at its own rows, rank 0 at the dense state.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpoint.write import PARTS_SECONDS, Whole, amend, seal, write_part
from genatt_dist.training.engine import Engine
from genatt_dist.training.nonfinite import NotFiniteError

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable

WRITE_SECONDS = 3 * PARTS_SECONDS  # a write that takes longer hangs
_GRACE_SECONDS = 10.0  # given to a write in flight when training failed


class Saver:
    """A context in which checkpoints are saved; at its end the last one is complete."""

    def __init__(
        self,
        store: Store,
        config: RunConfig,
        engine: Engine,
        table: ShardedTable | None,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """group: of all ranks, in which they may wait as long as a write takes; default: the one they train in."""
        self._store, self._config, self._engine, self._table, self._device = store, config, engine, table, device
        self._rank, self._group = dist.get_rank(), group
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

        Raises NotFiniteError when there is a number that is none, and GenattError when this checkpoint, or in the
        background the former one, cannot be written.
        """
        self.wait()
        self._step = progress.step
        token = self._begin()
        dense = self._engine.state(keep=self._rank == 0)
        shards = self._table.shards if self._table else []
        self._check_finite(dense.values(), shards)
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
        dist.barrier(self._group)

    def amend(self, progress: Progress) -> None:
        """Give the complete checkpoint of this step, with the same weights, another progress. Collective.

        Raises GenattError when that cannot be written.
        """
        self.wait()
        self._step = progress.step
        if self._rank == 0:
            try:
                whole = self._store.at(self._step)
                amend(whole.path, whole.files, progress)
                self._store.keep(self._config.training.checkpoint, progress.best_step)
            except Exception as error:
                self._failure = error
        self.check()
        dist.barrier(self._group)

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
            self._thread.join(WRITE_SECONDS)
            if self._thread.is_alive():
                raise GenattError(
                    f"the checkpoint of step {self._step} is not written after {WRITE_SECONDS:.0f} s: look into "
                    f"{redact(self._store.root)}"
                )
            self._thread = None
        self.check()

    def _check_finite(self, dense: Iterable[Tensor], shards: list[TableShard]) -> None:
        """Raise NotFiniteError on all ranks where one holds a number that is none. Collective."""
        tables = [value for shard in shards for value in (shard.rows, *shard.optimizer.values())]
        broken = torch.zeros(2, device=self._device)
        broken[0], broken[1] = (_any_not_finite(values, self._device) for values in (dense, tables))
        if dist.get_world_size() > 1:
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        names = [name for name, bad in zip(("dense weights", "table rows"), broken.tolist(), strict=True) if bad]
        if names:
            raise NotFiniteError(f"{' and '.join(names)} are not finite")

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


def _any_not_finite(values: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether a number is NaN or infinite: 0 or 1. One pass without a temporary: the largest magnitude is neither."""
    largest = [
        torch.linalg.vector_norm(value.detach(), torch.inf).to(device, torch.float32)
        for value in values
        if value.is_floating_point() and value.numel()
    ]
    return torch.stack(largest).isfinite().logical_not().any() if largest else torch.zeros((), device=device)
