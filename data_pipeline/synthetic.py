"""A synthetic interaction log of any size: Zipf popularity, and a planted successor that a sequence model can find.

Items lie on a ring in the order of their ids. With probability `follow` the next item of a user is the successor of
the one before it on that ring; otherwise it is a fresh draw from a Zipf law. So popularity explains part of the log,
and the order explains more. Each user is active in a window of a year of their own, with as many rows as the law of
lengths gives.

**How it streams.** Every row is a function of (seed, user, place in the user's history): its random numbers are hashes
of a counter, not the next ones of a generator. So the log can be made in slices of time, each with all users in it, as
a service writes its log: a slice needs the users' windows and lengths and the item each user was last on (48 bytes a
user), and nothing of the other rows. Rows are in the order of time, and files (`files=N`) are consecutive spans of time
of about equally many rows. A file has rows of a large part of all users, side by side, which is what makes grouping by
user hard. Generating user by user would be simpler, but each user would be in one file, as in no real log.
"""

import difflib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_pipeline.errors import GenattError
from data_pipeline.hashing import GOLDEN, mix
from data_pipeline.storage import explaining, filesystem

NUM_GENRES = 20
MIN_LENGTH = 5
START = 1_600_000_000  # unix seconds
YEAR = 365 * 24 * 3600
HOUR = 3600

USER_BLOCK = 1 << 16  # users whose rows of a slice are made at once
SLICE_ROWS = (1 << 20, 1 << 22)  # least and most rows of a slice, on average; between them, four a user
ROW_GROUP = 1 << 18
EXACT_RANKS = 1 << 10  # from here on the Zipf law is drawn from its integral: right to 1e-7 of each probability
TIME_BINS = 1 << 12

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Options(BaseModel):
    """Of `synthetic:users=1000,items=500,rows=20000,seed=0,…`; `follow`: strength of the planted order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int = Field(1000, ge=1, lt=1 << 31)
    items: int = Field(500, ge=2, lt=1 << 31)
    rows: int = Field(20_000, ge=1, lt=1 << 40)
    seed: int = Field(0, ge=0, lt=1 << 63)
    follow: float = Field(0.6, ge=0, le=1)
    zipf: float = Field(1.0, ge=0, le=5, description="Exponent of the popularity law; 0: all items alike.")
    lengths: Literal["lognormal", "geometric", "zipf", "fixed"] = Field(
        "lognormal", description="Law of the rows a user has beyond `min_length`; their mean is rows / users in each."
    )
    min_length: int = Field(MIN_LENGTH, ge=1, description="Rows every user has at least.")
    files: int = Field(1, ge=1, le=100_000, description="Parquet files, consecutive in time.")
    events: str | None = Field(None, description="Event types with their weights: view:90+cart:7+buy:3.")

    @classmethod
    def parse(cls, text: str) -> "Options":
        """Reads `key=value,key=value`; `GenattError` for an unknown key, a bad value, or too few rows for the users."""
        pairs = dict(part.partition("=")[::2] for part in text.split(",") if part)
        for key in pairs.keys() - cls.model_fields.keys():
            near = difflib.get_close_matches(key, cls.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise GenattError(f"synthetic: unknown option {key!r}: {hint}options are {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(pairs)
        except ValidationError as error:
            first = error.errors()[0]
            place = f"{first['loc'][0]}={first['input']}: " if first["loc"] else ""
            raise GenattError(f"synthetic: {place}{first['msg'].removeprefix('Value error, ')}") from None

    @field_validator("events")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            event_shares(text)
        return text

    @model_validator(mode="after")
    def _enough_rows(self) -> "Options":
        if self.rows < self.min_length * self.users:
            raise ValueError(
                f"rows={self.rows} is too few for users={self.users}: give {self.min_length} a user or more"
            )
        if self.files > self.rows:
            raise ValueError(f"files={self.files} is too many for rows={self.rows}: give a row or more a file")
        return self


def event_shares(text: str) -> dict[str, float]:
    """Reads `view:90+cart:7+buy:3`; shares add up to 1. `ValueError` where it cannot."""
    weights: dict[str, float] = {}
    for part in text.split("+"):
        name, _, weight = part.partition(":")
        if name in weights:
            raise ValueError(f"{name} is there twice; give each event one weight")
        try:
            weights[name] = float(weight or "nan")
        except ValueError:
            weights[name] = math.nan
        if not name or not 0 < weights[name] < math.inf:
            raise ValueError(f"{part!r} is not NAME:WEIGHT with a weight above 0; write view:90+cart:7+buy:3")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def write(options: Options, directory: Path) -> None:
    """Writes the log and its items into `directory`; see `write_to`."""
    write_to(options, str(directory))


def write_to(options: Options, url: str) -> None:
    """Writes the log into the directory `url` (any fsspec path), streaming: memory does not grow with `rows`.

    The files are `interactions.parquet`, or `interactions.00000-of-00016.parquet` and so on where `files` is above 1,
    and `items.parquet` (item_id, title, genres). The same options give the same bytes.

    Raises
    ------
    GenattError
        `url` cannot be written.
    """
    fs, root = filesystem(url)
    names = ["interactions.parquet"]
    if options.files > 1:
        names = [f"interactions.{file:05d}-of-{options.files:05d}.parquet" for file in range(options.files)]
    with explaining(url, "write"):
        if isinstance(fs, LocalFileSystem):
            os.makedirs(root, exist_ok=True)
        for name, (_, slices) in zip(names, itertools.groupby(_slices(options), lambda pair: pair[0]), strict=True):
            _write_parquet(fs, f"{root}/{name}", log_schema(options), (table for _, table in slices))
        _write_parquet(fs, f"{root}/items.parquet", ITEM_SCHEMA, item_tables(options))


def tables(options: Options) -> Iterator[pa.Table]:
    """The log in the order of time, in pieces: user_id, item_id, timestamp (unix seconds) int64, [event string]."""
    for _, table in _slices(options):
        yield table


def item_tables(options: Options) -> Iterator[pa.Table]:
    """The items in pieces: item_id int64 1..items, title, genres (one each; neighbours on the ring share it)."""
    for begin in range(0, options.items, ROW_GROUP):
        item = np.arange(begin, min(begin + ROW_GROUP, options.items))
        names = pa.array([f"genre {genre + 1}" for genre in range(NUM_GENRES)])
        genre = names.take(pa.array(item * NUM_GENRES // options.items))
        genres = pa.ListArray.from_arrays(pa.array(np.arange(len(item) + 1, dtype=np.int32)), genre)
        item_id = pa.array(item + 1)
        title = pc.binary_join_element_wise("item", item_id.cast(pa.string()), " ")
        yield pa.table([item_id, title, genres], schema=ITEM_SCHEMA)


ITEM_SCHEMA = pa.schema([("item_id", pa.int64()), ("title", pa.string()), ("genres", pa.list_(pa.string()))])


def log_schema(options: Options) -> pa.Schema:
    """Columns of the log."""
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])
    return schema if options.events is None else schema.append(pa.field("event", pa.string()))


@dataclass(frozen=True)
class _Users:
    """Arrays of shape (users,). The rows of user u have counters `first[u]` to `first[u] + length[u]`, exclusive."""

    length: Integers
    first: Integers
    begin: Integers  # seconds from START
    span: Integers  # seconds in which the user is active

    @classmethod
    def draw(cls, options: Options) -> "_Users":
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(options.seed)))
        shape = options.users
        length = options.min_length + _lengths(options, rng)
        # Most users stay for a part of the year; none has more than about a row a second.
        span = np.clip((YEAR * rng.random(shape) ** 2).astype(np.int64), np.minimum(length + HOUR, YEAR), YEAR)
        begin = (rng.random(shape) * (YEAR - span)).astype(np.int64)
        return cls(length, np.cumsum(length) - length, begin, span)

    def bounds(self, slices: int) -> Integers:
        """Times that cut the year into `slices` of about equally many rows, shape (slices + 1,), seconds from START."""
        edges = np.linspace(0, YEAR, TIME_BINS + 1)
        rate = self.length / self.span
        change = np.bincount(np.searchsorted(edges, self.begin), rate, TIME_BINS + 2)
        change -= np.bincount(np.searchsorted(edges, self.begin + self.span), rate, TIME_BINS + 2)
        rows = np.concatenate([[0.0], np.cumsum(np.maximum(np.cumsum(change[:TIME_BINS]), 0))])
        inner = np.interp(np.arange(1, slices) * (rows[-1] / slices), rows, edges).astype(np.int64)
        return np.concatenate([[0], inner, [YEAR]])


def _lengths(options: Options, rng: np.random.Generator) -> Integers:
    """Rows of each user beyond `min_length`; they add up exactly."""
    spare = options.rows - options.min_length * options.users
    if options.lengths == "fixed":
        return spare // options.users + (np.arange(options.users) < spare % options.users)
    if options.lengths == "lognormal":
        weight = rng.lognormal(sigma=0.8, size=options.users)
    elif options.lengths == "geometric":
        weight = rng.exponential(size=options.users)
    else:
        weight = 1 + rng.pareto(2.0, size=options.users)
    running = np.cumsum(weight)  # rounding the running sum, not each length, makes the total exact
    ends = np.minimum(np.floor(running * (spare / running[-1])).astype(np.int64), spare)
    ends[-1] = spare
    return np.diff(ends, prepend=0)


def _slices(options: Options) -> Iterator[tuple[int, pa.Table]]:
    """(number of the file, rows of one span of time), in order; every file has a slice at least."""
    users, popularity = _Users.draw(options), _Popularity(options.items, options.zipf)
    key = mix(np.array([options.seed], np.uint64) + GOLDEN)
    done = np.zeros(options.users, np.int64)  # rows of each user in earlier slices
    place = np.zeros(options.users, np.int64)  # on the ring, of the last of them
    per_slice = min(max(SLICE_ROWS[0], 4 * options.users), SLICE_ROWS[1])
    per_file = math.ceil(options.rows / options.files / per_slice)
    times = users.bounds(per_file * options.files)
    for number, (start, end) in enumerate(itertools.pairwise(times.tolist())):
        blocks = []
        for first in range(0, options.users, USER_BLOCK):
            block = slice(first, first + USER_BLOCK)
            upto = users.length[block] if end == YEAR else _rows_before(users, block, end, key)
            counts = upto - done[block]
            blocks.append(_rows(users, block, counts, done[block], place[block], options, popularity, key))
            done[block] = upto
        yield number // per_file, _in_order_of_time(blocks, start, end, options)


def _rows_before(users: _Users, block: slice, end: int, key: Words) -> Integers:
    """How many rows each user of `block` has before `end`.

    Row j of a user is at begin + span · (j + U_j) / length with U_j uniform in [0, 1): rising in j, so one look at the
    row at the border is enough.
    """
    border = (end - users.begin[block]) * (users.length[block] / users.span[block])
    inside = np.clip(border, 0, users.length[block])
    row = np.minimum(np.floor(inside).astype(np.int64), users.length[block] - 1)
    late = _fraction(_words(users.first[block] + row, key)) >= inside - row
    return row + 1 - late


def _words(counters: Integers, key: Words) -> Words:
    return mix(counters.view(np.uint64) * GOLDEN + key)


def _fraction(words: Words) -> Floats:
    """The upper half of each word as a number in [0, 1); the lower half decides whether the row follows."""
    return (words >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _rows(
    users: _Users,
    block: slice,
    counts: Integers,
    done: Integers,
    place: Integers,
    options: Options,
    popularity: "_Popularity",
    key: Words,
) -> tuple[Integers, Integers, Integers, Words]:
    """(user, time, item, hash) of the next `counts` rows of each user of `block`; moves `place` to the last of them."""
    present = np.flatnonzero(counts)
    counts = counts[present]
    heads = np.cumsum(counts) - counts  # where each user's rows begin
    total = int(counts.sum())
    row = np.arange(total)
    number = row + np.repeat(done[present] - heads, counts)  # place in the user's history
    words = _words(number + np.repeat(users.first[block][present], counts), key)

    scale = users.span[block][present] / users.length[block][present]
    waited = (number + _fraction(words)) * np.repeat(scale, counts)
    time = waited.astype(np.int64) + np.repeat(users.begin[block][present], counts)

    # Followers walk the ring, so each row is at the last anchor before it (a fresh draw, or where the user was when
    # the slice began) plus its distance from it.
    anchor = (words & np.uint64(0xFFFFFFFF)) >= np.uint64(round(options.follow * 2**32))
    anchor[heads[done[present] == 0]] = True  # nothing to follow
    follows = ~anchor[heads]
    anchor[heads] = True
    anchors = np.flatnonzero(anchor)
    start = popularity.draw(_fraction_53(mix(words[anchors] + GOLDEN)))
    start[np.searchsorted(anchors, heads[follows])] = place[present[follows]] + 1
    on_ring = (np.repeat(start - anchors, np.diff(anchors, append=total)) + row) % options.items
    place[present] = on_ring[heads + counts - 1]
    return np.repeat(present + block.start, counts), time, on_ring, words


def _fraction_53(words: Words) -> Floats:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _in_order_of_time(
    blocks: list[tuple[Integers, Integers, Integers, Words]], start: int, end: int, options: Options
) -> pa.Table:
    """One table of the blocks' rows by (time, user, place in the history); ids count from 1."""
    user, time, item, words = (np.concatenate(column) for column in zip(*blocks, strict=True))
    # One sort of plain integers is several times faster than an argsort: time above, place in the slice below. Rounding
    # may put a row on the wrong side of the border of its slice by a second.
    packed = (np.clip(time, start, max(start, end - 1)) - start) << 32 | np.arange(len(user))
    packed.sort()
    order = packed & 0xFFFFFFFF
    columns = [pa.array(user[order] + 1), pa.array(item[order] + 1), pa.array((packed >> 32) + (START + start))]
    if options.events is not None:
        shares = event_shares(options.events)
        edges = np.cumsum(list(shares.values()))[:-1]
        codes = np.searchsorted(edges, _fraction_53(mix(words[order] ^ GOLDEN)), side="right").astype(np.int8)
        columns.append(pa.DictionaryArray.from_arrays(codes, list(shares)).dictionary_decode())
    return pa.table(columns, schema=log_schema(options))


class _Popularity:
    """Draws items by Zipf's law, P(rank k) ∝ k^-s, with no table of all items.

    The first `EXACT_RANKS` ranks are drawn from their exact sums; the rest, as ∫ x^-s dx over [k - 1/2, k + 1/2], by
    inverting the integral. Rank k is on the ring at k times a number near items / golden ratio that shares no factor
    with `items`: popular items are spread over the ring, and each is there once.
    """

    def __init__(self, items: int, exponent: float) -> None:
        self.items, self.exponent = items, exponent
        head = min(items, EXACT_RANKS)
        self.sums = np.cumsum(np.arange(1, head + 1, dtype=np.float64) ** -exponent)
        self.border = head + 0.5
        tail = self._integral(items + 0.5) - self._integral(self.border) if items > head else 0.0
        self.total = self.sums[-1] + tail
        step = round(items * (math.sqrt(5) - 1) / 2)
        while math.gcd(step, items) != 1:
            step += 1
        self.step = step

    def draw(self, uniform: Floats) -> Integers:
        """Places on the ring, 0..items - 1, for numbers in [0, 1)."""
        mass = uniform * self.total
        rank = np.searchsorted(self.sums, mass, side="right")
        tail = np.flatnonzero(rank == len(self.sums))
        if len(tail) and self.items > len(self.sums):
            x = self._inverse(mass[tail] - self.sums[-1] + self._integral(self.border))
            rank[tail] = np.clip(np.rint(x), len(self.sums) + 1, self.items).astype(np.int64) - 1
        return np.minimum(rank, self.items - 1) * self.step % self.items

    def _integral(self, x: float) -> float:
        return math.log(x) if self.exponent == 1 else x ** (1 - self.exponent) / (1 - self.exponent)

    def _inverse(self, mass: Floats) -> Floats:
        if self.exponent == 1:
            return np.exp(mass)
        inverse: Floats = ((1 - self.exponent) * mass) ** (1 / (1 - self.exponent))
        return inverse


def _write_parquet(fs: fsspec.AbstractFileSystem, path: str, schema: pa.Schema, pieces: Iterator[pa.Table]) -> None:
    # Ids hardly repeat within a page, and times rise: a dictionary would cost time and save nothing.
    encoding = {"use_dictionary": ["event"] if "event" in schema.names else False, "compression": "zstd"}
    with fs.open(path, "wb") as file, pq.ParquetWriter(file, schema, **encoding) as writer:
        for piece in pieces:
            writer.write_table(piece, row_group_size=ROW_GROUP)
