"""Training batches under Ray Train: from the blocks that Ray Data gives each worker, every row once an epoch.

    trainer = TorchTrainer(loop, datasets={"train": ray_dataset(path, data)}, dataset_config=every_row(), …)
    # in the loop of each worker:
    feed = RayBatches(TrainingBatches.plan(sequences, data, training), all_gathered(group))
    for batch in feed.iterate(ray.train.get_dataset_shard("train"), epoch, rank, world_size, device): …

Ray assigns blocks to workers as they ask for them, so the order is its own: an epoch has the windows and the number of
batches of the plan, but other batches than the loader's, and no cursor inside it. How many rows a worker gets is up to
Ray too, while every step is collective. So workers compare what they hold once for a pool of batches, not once a step:
who got too few rows is given some of the others', and all learn how many tokens each global batch of the pool has.

Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive
from genatt_dist.data.ahead import BATCHES_AHEAD, ahead
from genatt_dist.data.arrays import Events, Ints, timed
from genatt_dist.data.batches import Batch, Part, TrainingBatches
from genatt_dist.data.context import seconds
from genatt_dist.data.ray_dataset import schema
from genatt_dist.data.row_groups import flat
from genatt_dist.data.sequences import gather
from genatt_dist.data.shuffle import POOL_BATCHES, batches_of
from genatt_dist.data.windows import Windows

if TYPE_CHECKING:
    from ray.data import DataIterator


def all_gathered(group: dist.ProcessGroup | None = None) -> Callable[[Any], list[Any]]:
    """What every rank passes, on all ranks, by rank. group: one for the CPU (gloo), also where training has another."""

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    return exchange


@dataclass(frozen=True)
class RayBatches:
    """Batches of the windows that `plan` counts. exchange: see `all_gathered`; a collective of all ranks."""

    plan: TrainingBatches
    exchange: Callable[[Any], list[Any]]

    def iterate(
        self, shard: DataIterator, epoch: int, rank: int, world_size: int, device: torch.device
    ) -> Generator[Batch, None, None]:
        """This rank's parts of the batches of an epoch, `plan.num_batches` on every rank.

        Raises GenattError when a rank would get no sequence of a batch, or when Ray gave other rows than the plan has.
        """
        blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for part in self.parts(iter(blocks), epoch, rank, world_size):
            yield part.on(device)

    def parts(self, blocks: Iterator[pa.Table], epoch: int, rank: int, world_size: int) -> Generator[Part, None, None]:
        """`iterate` of tables of rows, not yet on a device."""
        total, number = self.plan.num_windows, self.plan.num_batches
        if total // number < world_size:
            raise GenattError(
                f"a global batch of {total // number} sequences for {world_size} ranks: raise training.batch_sequences"
            )
        pool = POOL_BATCHES * max(1, self.plan.data.shuffle_windows * number // (total * POOL_BATCHES))
        held = _Held(blocks, schema(bool(self.plan.sequences.features.contexts)))
        for first in range(0, number, pool):
            end = min(first + pool, number)
            windows = total * end // number - total * first // number
            shares = np.diff(windows * np.arange(world_size + 1) // world_size)
            rows = self._share(held, shares, rank)
            yield from self._pool(rows, end - first, rank, epoch, first)
        if held.more(1):
            raise GenattError(f"Ray gave more rows than the {total} windows of the plan: make both of one path")

    def _share(self, held: _Held, share_W: Ints, rank: int) -> pa.Table:
        """This rank's share of a pool, out of what it holds and what others have too much. Collective."""
        missing = np.maximum(share_W - self.exchange(held.more(int(share_W[rank]))), 0)
        short = int(missing.sum())
        if not short:
            return held.take(int(share_W[rank]))
        surplus = np.maximum(np.array(self.exchange(held.more(int(share_W[rank]) + short))) - share_W, 0)
        before = np.cumsum(surplus) - surplus
        given = np.clip(short - before, 0, surplus)
        if given.sum() < short:
            raise GenattError(
                f"Ray gave {short - given.sum()} rows less than the {self.plan.num_windows} windows of the plan: make "
                "both of one path, and split with genatt_dist.data.ray_dataset.every_row()"
            )
        own = held.take(int(share_W[rank] - missing[rank]))
        gifts = pa.concat_tables(self.exchange(held.take(int(given[rank]))))
        mine = slice(int(missing[:rank].sum()), int(missing[: rank + 1].sum()))
        return pa.concat_tables([own, gifts.slice(mine.start, mine.stop - mine.start)])

    def _pool(self, rows: pa.Table, number: int, rank: int, epoch: int, first: int) -> Iterator[Part]:
        """`number` batches of this rank's rows. Collective."""
        rows = rows.combine_chunks()
        lists = rows["items"].combine_chunks()
        length = pc.list_value_length(lists).to_numpy().astype(np.int64) - 1
        items: Events = lists.flatten().to_numpy()
        if "times" in rows.column_names:
            manifest = self.plan.sequences.manifest
            items = timed(items, seconds(flat(rows["times"]), manifest.time_unit, manifest.name))
        start = np.cumsum(length + 1) - length - 1
        windows = Windows(start, length, rows["window"].to_numpy())
        batches = batches_of(self._random(epoch, first, 1 + rank).permutation(len(length)), length, number)
        mine = np.array([(length[batch].sum(), len(batch)) for batch in batches])
        tokens, sequences = np.sum(self.exchange(mine), axis=0).T.tolist()
        last, features = self.plan.data.targets == "last", self.plan.sequences.features
        # The same order on all ranks, so that their parts of a batch are alike in length.
        for index in self._random(epoch, first, 0).permutation(number):
            chosen = windows.of(batches[index])
            part = gather(items, chosen.start_B, chosen.length_B + 1)
            yield Part.of(part, chosen, last, tokens[index], sequences[index], features)

    def _random(self, *words: int) -> np.random.Generator:
        key = int(derive(self.plan.seed, int(Purpose.SHUFFLE), *words)) % (1 << 64)
        return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class RayFeed:
    """`RayBatches` of one worker's shard, as the trainer takes them."""

    batches: RayBatches
    shard: DataIterator

    def iterate(
        self, epoch: int, first_batch: int, rank: int, world_size: int, device: torch.device
    ) -> Generator[Batch, None, None]:
        """See `RayBatches.iterate`. Raises GenattError for a `first_batch` inside an epoch: Ray's order is its own."""
        if first_batch:
            raise GenattError(
                f"the checkpoint was written after batch {first_batch} of epoch {epoch}, and data.feed=ray goes on at "
                "epochs' ends only: resume with data.feed=loader, as the run began"
            )
        return self.batches.iterate(self.shard, epoch, rank, world_size, device)


class _Held:
    """Rows that have come and are not trained yet."""

    def __init__(self, blocks: Iterator[pa.Table], schema: pa.Schema) -> None:
        self._blocks = ahead(blocks, BATCHES_AHEAD, "block of Ray Data")
        self._schema, self._rows = schema, schema.empty_table()

    def more(self, count: int) -> int:
        """Wait until so many rows are here, or all that come; how many there are."""
        tables = [self._rows]
        here = len(self._rows)
        while here < count and (block := next(self._blocks, None)) is not None:
            if missing := set(self._schema.names) - set(block.column_names):
                raise GenattError(
                    f"rows of Ray without {missing.pop()}, which features of type context need: make them by "
                    "ray_dataset(path, data, timed=True)"
                )
            tables.append(block.select(self._schema.names).cast(self._schema))
            here += len(block)
        self._rows = pa.concat_tables(tables)
        return here

    def take(self, count: int) -> pa.Table:
        """The first rows, which then are here no more; a copy, so that nothing else travels or is kept with them."""
        rows = self._rows.slice(0, count).take(np.arange(min(count, len(self._rows))))
        self._rows = self._rows.slice(count)
        return rows
