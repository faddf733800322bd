"""A synthetic interaction log: Zipf popularity, and a planted successor that a sequence model can find.

Items lie on a ring. With probability `follow` the next item is the successor of the one before it on that ring;
otherwise it is a fresh draw from a Zipf law. So popularity explains part of the log, and the order explains more.
"""

import difflib
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.errors import GenattError

NUM_GENRES = 20
MIN_LENGTH = 5
START = 1_600_000_000  # unix seconds
YEAR = 365 * 24 * 3600


class Options(BaseModel):
    """Of `synthetic:users=1000,items=500,rows=20000,seed=0,follow=0.6`; `follow`: strength of the planted order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int = Field(1000, ge=1)
    items: int = Field(500, ge=2)
    rows: int = Field(20_000, ge=1)
    seed: int = Field(0, ge=0)
    follow: float = Field(0.6, ge=0, le=1)

    @classmethod
    def parse(cls, text: str) -> "Options":
        """Reads `key=value,key=value`; `GenattError` for an unknown key, a bad value, or too few rows for the users."""
        pairs = dict(part.partition("=")[::2] for part in text.split(",") if part)
        for key in pairs.keys() - cls.model_fields.keys():
            near = difflib.get_close_matches(key, cls.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise GenattError(f"synthetic: unknown option {key!r}: {hint}options are {', '.join(cls.model_fields)}")
        try:
            options = cls.model_validate(pairs)
        except ValidationError as error:
            first = error.errors()[0]
            raise GenattError(f"synthetic: {first['loc'][0]}={first['input']}: {first['msg']}") from None
        if options.rows < MIN_LENGTH * options.users:
            raise GenattError(
                f"synthetic: rows={options.rows} is too few for users={options.users}: give {MIN_LENGTH} a user or more"
            )
        return options


def write(options: Options, directory: Path) -> None:
    """Writes `interactions.parquet` and `items.parquet` (one genre an item) into `directory`."""
    interactions, items = generate(options)
    interactions.write_parquet(directory / "interactions.parquet")
    items.write_parquet(directory / "items.parquet")


def generate(options: Options) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions (user_id, item_id, timestamp) in the order they happened, and items (item_id, title, genres)."""
    rng = np.random.default_rng(options.seed)
    ring = rng.permutation(options.items)  # ring position -> item
    position_of = np.argsort(ring)

    activity = rng.lognormal(sigma=0.8, size=options.users)
    spare = options.rows - MIN_LENGTH * options.users
    lengths = MIN_LENGTH + rng.multinomial(spare, activity / activity.sum())
    row = np.arange(options.rows)
    first_row = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of the row's user

    # Followers walk the ring from the last fresh draw, so each row is that draw moved by its distance from it.
    fresh = (rng.random(options.rows) >= options.follow) | (row == first_row)
    popularity = np.cumsum(1.0 / np.arange(1, options.items + 1))
    draws = np.searchsorted(popularity, rng.random(options.rows) * popularity[-1], side="right")
    drawn_at = np.maximum.accumulate(np.where(fresh, row, 0))
    item = ring[(position_of[draws[drawn_at]] + row - drawn_at) % options.items]

    waits = np.cumsum(rng.integers(0, 3600, options.rows))
    begins = np.repeat(START + rng.integers(0, YEAR, options.users), lengths)
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(1, options.users + 1), lengths),
            "item_id": item + 1,
            "timestamp": begins + waits - waits[first_row],
        }
    )
    genre = position_of * NUM_GENRES // options.items  # neighbours on the ring share a genre
    item_id = pl.Series("item_id", np.arange(1, options.items + 1))
    genres = ("genre " + pl.Series("genres", genre + 1).cast(pl.String)).reshape((-1, 1)).arr.to_list()
    items = pl.DataFrame([item_id, ("item " + item_id.cast(pl.String)).alias("title"), genres.alias("genres")])
    return log.sort("timestamp", maintain_order=True), items
