"""Shards are read by row groups: only what is needed, ahead of the need, in bounded memory; damage is named."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_data import histories, write_prepared

from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data import ahead as ahead_module
from genatt_dist.data import row_groups
from genatt_dist.data.ahead import ahead
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.row_groups import RowGroups
from genatt_dist.data.sequences import Sequences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 users in 3 shards of 17 row groups each."""
    path = tmp_path_factory.mktemp("data") / "many"
    write_prepared(path, histories(users=400), num_shards=3)
    return path


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "row groups"))]


def no_threads_are_left() -> bool:
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not threads()


def batches_of(sequences: Sequences, shuffle_windows: int = 60) -> TrainingBatches:
    data = DataConfig(path="-", max_len=8, shuffle_windows=shuffle_windows)
    return TrainingBatches.plan(sequences, data, TrainingConfig(batch_sequences=8))


def whole(path: Path) -> np.ndarray:
    """All items, read with Arrow alone."""
    files = [path / file.path for file in load_manifest(str(path)).files]
    return np.concatenate([pq.read_table(file)["item_ids"].combine_chunks().flatten().to_numpy() for file in files])


def test_slices_are_those_of_the_files(many: Path) -> None:
    sequences, items = Sequences.read(str(many)), whole(many)
    draw = np.random.default_rng(0)
    for _ in range(20):
        users = draw.integers(0, sequences.num_users, draw.integers(0, 30))
        skipped = draw.integers(0, sequences.lengths[users])
        starts, lengths = sequences.offsets[users] + skipped, sequences.lengths[users] - skipped
        found, first = sequences.take(starts, lengths)
        assert len(found) == lengths.sum()
        for place, start, length in zip(first, starts, lengths, strict=True):
            assert found[place : place + length].tolist() == items[start : start + length].tolist()


def test_users_come_with_the_ids_and_places_of_their_shards(many: Path) -> None:
    sequences = Sequences.read(str(many))
    assert sequences.user_ids.to_pylist() == [100 + user for shard in range(3) for user in range(shard, 400, 3)]
    lists = histories(users=400)
    lengths = [len(lists[user - 100]) for user in sequences.user_ids.to_pylist()]
    assert sequences.lengths.tolist() == lengths
    assert sequences.train.tolist() == [length - 2 if length >= 3 else length for length in lengths]


def test_only_the_item_column_of_the_row_groups_asked_for_is_read(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    read_ranges = row_groups.read_ranges

    def watching(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        asked.extend((Path(path).name, start, stop) for start, stop in ranges)
        return read_ranges(path, ranges)

    monkeypatch.setattr(row_groups, "read_ranges", watching)
    sequences = Sequences.read(str(many))
    assert asked == []
    user = int(sequences.first_user_G[20]) + 3  # of the second shard's fourth row group
    for _ in range(2):
        sequences.take(sequences.offsets[[user]], sequences.lengths[[user]])
    file = sequences.manifest.files[1]
    column = pq.read_metadata(many / file.path).row_group(20 - 17).column(1)
    assert column.path_in_schema.startswith("item_ids")
    start = column.dictionary_page_offset or column.data_page_offset
    footer, chunk = asked
    assert footer == ("part-00001.parquet", 0, file.bytes)  # it is shorter than what is read of an end
    assert chunk == ("part-00001.parquet", start, start + column.total_compressed_size)


@pytest.mark.parametrize("capacity", [1, 600, 1 << 20])
def test_memory_is_bounded_and_batches_do_not_depend_on_it(capacity: int, many: Path) -> None:
    sequences = Sequences.read(str(many), prefetch_bytes=capacity)
    found = [batch.items_M.tolist() for batch in batches_of(sequences).iterate(0, 0, 0, 1, CPU)]
    expected = batches_of(Sequences.read(str(many))).iterate(0, 0, 0, 1, CPU)
    assert found == [batch.items_M.tolist() for batch in expected]
    assert sequences.groups._held <= capacity
    assert sequences.groups._held == sum(items.nbytes for items in sequences.groups._kept.values())


def test_reading_ahead_ends_where_the_bytes_do() -> None:
    """No more is on its way than fits, but for the row group that fills it up."""
    going, most, lock, gate = 0, 0, threading.Lock(), threading.Event()

    def read(group: int) -> np.ndarray:
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        gate.wait(5)
        with lock:
            going -= 1
        return np.full(10, group, np.int32)

    store = RowGroups(read, np.arange(0, 1010, 10), capacity=3 * 40)
    asked: list[int] = []
    stream = store.along((group, group) for group in range(100) if asked.append(group) is None)
    threading.Timer(0.1, gate.set).start()
    for number, (name, items) in enumerate(stream):
        assert (name, items.tolist()) == (number, [number] * 10)
        assert len(asked) <= number + 1 + 3
    assert most == 3
    assert number == 99


def test_a_data_set_that_fits_is_read_once(many: Path) -> None:
    sequences = Sequences.read(str(many))
    read = sequences.groups._read
    times: list[int] = []
    sequences.groups._read = lambda group: (times.append(group), read(group))[1]
    for epoch in range(3):
        list(batches_of(sequences).iterate(epoch, 0, 0, 1, CPU))
    assert sorted(times) == list(range(len(sequences.first_user_G) - 1))


def test_shards_larger_than_memory_are_not_read_to_verify_them(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    monkeypatch.setattr("data_pipeline.format.verify", lambda path, manifest: verified.append(path))
    Sequences.read(str(many), verify=True, prefetch_bytes=1000)
    assert verified == []
    Sequences.read(str(many), verify=True)
    assert verified == [str(many)]


class TestFaults:
    @pytest.fixture
    def copy(self, many: Path, tmp_path: Path) -> Path:
        return shutil.copytree(many, tmp_path / "copy")

    def train(self, path: Path) -> str:
        with pytest.raises(GenattError) as caught:
            list(batches_of(Sequences.read(str(path))).iterate(0, 0, 0, 1, CPU))
        assert no_threads_are_left()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_flipped_bit_is_named_by_file_and_row_group(self, copy: Path) -> None:
        file = copy / "shards" / "part-00001.parquet"
        column = pq.read_metadata(file).row_group(4).column(1)
        content = bytearray(file.read_bytes())
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        file.write_bytes(content)
        assert "shards/part-00001.parquet is damaged: cannot read item_ids of row group 4" in self.train(copy)

    @pytest.mark.parametrize("left", [0, 3, 900])
    def test_a_truncated_shard(self, left: int, copy: Path) -> None:
        file = copy / "shards" / "part-00002.parquet"
        file.write_bytes(file.read_bytes()[:left])
        assert "shards/part-00002.parquet" in self.train(copy)

    def test_a_shard_that_vanished(self, copy: Path) -> None:
        (copy / "shards" / "part-00000.parquet").unlink()
        message = self.train(copy)
        assert "shards/part-00000.parquet" in message
        assert "cannot read" in message

    def test_a_shard_of_another_preparation(self, copy: Path, many: Path) -> None:
        shutil.copy(many / "shards" / "part-00001.parquet", copy / "shards" / "part-00002.parquet")
        message = self.train(copy)
        assert "shards/part-00002.parquet" in message
        assert "is damaged" in message

    def test_ids_outside_the_catalogue(self, copy: Path) -> None:
        manifest = load_manifest(str(copy))
        (copy / "manifest.json").write_bytes(manifest.model_copy(update={"num_items": 7}).to_json())
        words = copy / "vocabulary" / "items.parquet"
        pq.write_table(pq.read_table(words).slice(0, 7), words)
        assert "row group 0: item ids span 1.." in self.train(copy)

    def test_an_index_that_is_not_of_its_shard(self, copy: Path) -> None:
        shutil.copy(copy / "index" / "part-00001.parquet", copy / "index" / "part-00002.parquet")
        with pytest.raises(GenattError, match=r"index/part-00002\.parquet is damaged: 133 users"):
            Sequences.read(str(copy))


class TestBackground:
    def test_items_come_in_order_and_not_further_ahead_than_allowed(self) -> None:
        made = 0

        def numbers() -> Iterator[int]:
            nonlocal made
            for number in range(50):
                made = number
                yield number

        for number in ahead(numbers(), 3, "number"):
            assert made <= number + 5  # those in the queue, the one that waits for room and the next
        assert number == 49
        assert no_threads_are_left()

    def test_an_error_is_raised_where_it_is_read(self) -> None:
        def two() -> Iterator[int]:
            yield from (1, 2)
            raise GenattError("the third is damaged")

        stream = ahead(two(), 4, "number")
        assert [next(stream), next(stream)] == [1, 2]
        with pytest.raises(GenattError, match="the third is damaged"):
            next(stream)
        assert no_threads_are_left()

    def test_threads_end_when_the_batches_are_dropped(self, many: Path) -> None:
        stream = batches_of(Sequences.read(str(many), prefetch_bytes=1)).iterate(0, 0, 0, 1, CPU)
        next(stream)
        assert threads()
        del stream
        assert no_threads_are_left()

    def test_a_wait_without_end_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ahead_module, "LIMIT_SECONDS", 0.2)
        gate = threading.Event()

        def never() -> Iterator[int]:
            gate.wait(10)
            yield 1

        with pytest.raises(GenattError, match="no number came in 0 s"):
            next(ahead(never(), 1, "number"))
        gate.set()
        assert no_threads_are_left()
