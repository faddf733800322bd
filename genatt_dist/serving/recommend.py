"""The best k items for known users, or for raw histories of unknown ones, from a Parquet or CSV file to a Parquet
file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from data_pipeline.hashing import hash64
from genatt_dist.data.arrays import Events, Ints, timed
from genatt_dist.data.context import seconds_of_column
from genatt_dist.data.histories import Histories
from genatt_dist.embedding.features import input_rows
from genatt_dist.embedding.ranking import Query
from genatt_dist.evaluation.categories import need_categories
from genatt_dist.evaluation.evaluate import encode, query
from genatt_dist.serving.trained import Trained

_SHOWN = 5


@dataclass(frozen=True)
class Requests:
    """Histories of dense ids: user i's are those at first[i] … end[i] - 1 of what `take` reads from.

    take: slices (starts, lengths) as (items, first), see `Sequences.take`.
    key_U: what a user's noise hangs on: its index in the data set, so that any file of users gives it the same list;
    of raw histories a hash of its id. notes: what was skipped, one line each. groups: the different choices of
    categories; user i made groups[group_U[i]], an empty one is none.
    """

    user_ids: pl.Series
    take: Callable[[Ints, Ints], tuple[Events, Ints]]
    first: Ints
    end: Ints
    key_U: Ints
    notes: list[str]
    wanted: pl.Series | None = None


def read_requests(path: Path, trained: Trained, category_column: str | None = None) -> Requests:
    """Read who asks. A file with the data's item column holds raw histories (in time order: by the time column if it
    has one, else by row); without it, users the model was trained on.

    category_column: of the file, text or lists of text: a user wants items of any category in the user's rows.
    """
    names = trained.sequences.manifest.config
    user, item, time = str(names["user_column"]), str(names["item_column"]), names.get("time_column")
    table = _read(path, _text_columns(trained, user, item))
    if user not in table.columns:
        raise GenattError(
            f"{path} has no column {user}: it has {', '.join(table.columns)}; rename the users' column to {user}"
        )
    if not table.height:
        raise GenattError(f"{path} has no rows: nobody to recommend to")
    if item in table.columns:
        requests = _histories(
            table.select(
                pl.col(user).alias("user"),
                pl.col(item).alias("item"),
                *([pl.col(time).alias("time")] if time in table.columns else []),
            ),
            path,
            trained,
        )
    else:
        requests = _known(table[user].unique(maintain_order=True), path, trained)
    if category_column is None:
        return requests
    return replace(requests, wanted=_wanted(table, path, user, category_column, requests.user_ids))


def recommend(
    trained: Trained,
    requests: Requests,
    k: int,
    progress: Callable[[int], None] = lambda users: None,
    only: Sequence[str] = (),
) -> pl.DataFrame:
    """k rows a user: user_id, rank (from 1), item_id (original), score. Items in the history are left out if
    evaluation did so.

    only: categories; lists hold items of any of them, or of those that the user's own request names instead.
    """
    if not 1 <= k <= trained.sequences.num_items:
        raise GenattError(f"k={k} is not between 1 and the catalogue's {trained.sequences.num_items} items")
    vocabulary = shards.read_vocabulary(trained.config.data.path, trained.sequences.manifest)
    original = pl.DataFrame(vocabulary.select(["dense_id", "item_id"])).sort("dense_id")["item_id"]
    evaluation = trained.config.evaluation
    restrict = _restriction(trained, requests, only)
    parts = []
    for low in range(0, len(requests.user_ids), evaluation.batch_users):
        here = slice(low, low + evaluation.batch_users)
        rows = np.arange(low, min(low + evaluation.batch_users, len(requests.user_ids)))
        lengths = requests.end[here] - requests.first[here]
        items, first = requests.take(requests.first[here], lengths)
        histories = Histories.of(
            items,
            first,
            first + lengths,
            requests.key_U[here],
            trained.config.data.max_len,
            trained.device,
            features=trained.sequences.features,
        )
        with torch.no_grad():
            rows_ND = input_rows(trained.table, histories)
            states_BD = encode(trained.backbone, rows_ND, histories, trained.config)
            asked = query(states_BD, histories, evaluation.exclude_seen, trained.sequences.manifest.out_of_vocabulary)
            ranking = trained.table.rank(restrict(asked, here), k, evaluation.chunk_items)
        score = ranking.score_Bk.cpu().numpy().ravel()
        dense = ranking.top_Bk.cpu().numpy().ravel()
        part = pl.DataFrame(
            {
                "user_id": requests.user_ids.gather(np.repeat(rows, k)),
                "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(rows)),
                "item_id": original.gather(np.maximum(dense, 1) - 1),
                "score": score,
            }
        )
        # Fewer than k for somebody who has seen nearly everything, or where the list names a hash bucket without items.
        parts.append(part.filter(pl.Series(np.isfinite(score) & (dense > 0))).drop_nulls("item_id"))
        progress(len(rows))
    return pl.concat(parts)


def _restriction(trained: Trained, requests: Requests, only: Sequence[str]) -> Callable[[Query, slice], Query]:
    """What gives the query of some of the users the filter of their categories."""
    if requests.wanted is None and not only:
        return lambda asked, users: asked
    column, device = trained.config.evaluation.category_column, trained.device
    categories = need_categories(trained.sequences, column, device)
    own = requests.wanted
    if own is None:
        own = pl.Series([[]], dtype=pl.List(pl.String)).new_from_index(0, len(requests.user_ids))
    chosen = own.to_frame("names").with_columns(pl.col("names").list.unique().list.sort())
    groups = chosen.unique(maintain_order=True).with_row_index("group")
    group_U = chosen.join(groups, on="names", how="left", maintain_order="left")["group"].to_numpy().astype(np.int64)
    names = [list(group or only) for group in groups["names"].to_list()]
    for name in {name for group in names for name in group}:
        categories.index(name)  # refused before anybody is ranked

    def restrict(asked: Query, users: slice) -> Query:
        present, group_B = np.unique(group_U[users], return_inverse=True)
        return replace(
            asked, only=categories.filter([names[group] for group in present.tolist()], torch.from_numpy(group_B))
        )

    return restrict


def write(table: pl.DataFrame, out: Path) -> None:
    """Write the recommendations; the file appears whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(temporary)
        temporary.rename(out)
    except OSError as error:
        raise GenattError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def _text_columns(trained: Trained, user: str, item: str) -> dict[str, type[pl.String]]:
    """Id columns that are text in the data set: read from CSV as such, 007 stays 007."""
    vocabulary = shards.read_vocabulary(trained.config.data.path, trained.sequences.manifest)
    types = {user: trained.sequences.user_ids.type, item: vocabulary.schema.field("item_id").type}
    return {name: pl.String for name, kind in types.items() if pa.types.is_string(kind)}


def _read(path: Path, text_columns: dict[str, type[pl.String]]) -> pl.DataFrame:
    if not path.exists():
        raise GenattError(f"{path} does not exist: name a Parquet or CSV file of users")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, schema_overrides=text_columns, separator="\t" if path.suffix == ".tsv" else ",")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise GenattError(
            f"cannot read {path}: {str(error).splitlines()[0]}; give Parquet, or CSV with a header"
        ) from None


def _known(users: pl.Series, path: Path, trained: Trained) -> Requests:
    sequences = trained.sequences
    known = pl.DataFrame({"user": pl.from_arrow(sequences.user_ids)}).with_row_index("row")
    asked = pl.DataFrame({"user": _cast(users, known["user"].dtype)}).join(
        known, on="user", how="left", maintain_order="left"
    )
    missing = asked.filter(pl.col("row").is_null())["user"]
    found = asked.drop_nulls("row")
    if not found.height:
        raise GenattError(
            f"{path}: none of its {users.len()} users is in {sequences.manifest.name}; give histories: add "
            "an item column"
        )
    index = found["row"].to_numpy().astype(np.int64)
    notes = [
        _note(
            missing, "users", f"are not in {sequences.manifest.name}; add their histories (an item column) to the file"
        )
    ]
    return Requests(
        found["user"],
        sequences.take,
        sequences.offsets[index],
        sequences.offsets[index + 1],
        index,
        [note for note in notes if note],
    )


def _histories(table: pl.DataFrame, path: Path, trained: Trained) -> Requests:
    sequences = trained.sequences
    vocabulary = shards.read_vocabulary(trained.config.data.path, sequences.manifest)
    known = pl.DataFrame(vocabulary.select(["item_id", "dense_id"]))
    item = str(sequences.manifest.config["item_column"])
    table = table.with_columns(_cast(table["item"].alias(item), known["item_id"].dtype).alias("item"))
    joined = table.join(known, left_on="item", right_on="item_id", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("dense_id").is_null())["item"].unique(maintain_order=True)
    kept = joined.drop_nulls("dense_id")
    if "time" in kept.columns:
        kept = kept.sort("time", maintain_order=True)
    together = [name for name in ("dense_id", "time") if name in kept.columns]
    lists = kept.group_by("user", maintain_order=True).agg(together).sort("user")
    if not lists.height:
        raise GenattError(f"{path}: none of its items is in the vocabulary of {sequences.manifest.name}")
    users = table["user"].unique(maintain_order=True)
    lost = users.filter(~users.is_in(lists["user"].implode()))
    end = np.cumsum(lists["dense_id"].list.len().to_numpy().astype(np.int64))
    notes = [_note(unknown, "items", "are not in the vocabulary"), _note(lost, "users", "have no known item")]
    events: Events = lists["dense_id"].explode().to_numpy()
    if sequences.features.contexts and "time" in lists.columns:
        events = timed(events, seconds_of_column(lists["time"].explode(), sequences.manifest.time_unit, str(path)))
    return Requests(
        lists["user"],
        lambda starts, lengths: (events, starts),
        np.concatenate(([0], end[:-1])),
        end,
        hash64(lists["user"].to_arrow().cast(_id_type(lists["user"]))).view(np.int64),
        [note for note in notes if note],
    )


def _wanted(table: pl.DataFrame, path: Path, user: str, column: str, users: pl.Series) -> pl.Series:
    """The categories in the column for each of the users: list<string>."""
    if column not in table.columns:
        raise GenattError(f"{path} has no column {column}: it has {', '.join(table.columns)}; name one that it has")
    kind = table.schema[column]
    if not isinstance(kind.inner if isinstance(kind, pl.List) else kind, pl.String | pl.Categorical):
        raise GenattError(f"{path}: column {column} holds {kind}: categories are text, or lists of text")
    rows = table.select(pl.col(user).alias("user").cast(users.dtype), pl.col(column).alias("wanted"))
    rows = (rows.explode("wanted") if isinstance(kind, pl.List) else rows).cast({"wanted": pl.String}).drop_nulls()
    chosen = users.to_frame("user").join(
        rows.group_by("user").agg("wanted"), on="user", how="left", maintain_order="left"
    )
    return chosen["wanted"].fill_null([])


def _id_type(ids: pl.Series) -> pa.DataType:
    return pa.int64() if ids.dtype.is_integer() else pa.string()


def _cast(values: pl.Series, dtype: pl.DataType) -> pl.Series:
    try:
        return values.cast(dtype)
    except pl.exceptions.PolarsError:
        raise GenattError(
            f"column {values.name} holds {values.dtype} that is no {dtype}, the type of the data set's ids: "
            "write the ids as they are in the log"
        ) from None


def _note(values: pl.Series, what: str, why: str) -> str | None:
    if not values.len():
        return None
    shown = ", ".join(str(value) for value in values.head(_SHOWN).to_list())
    return f"skipped {values.len()} {what} that {why}: {shown}{' …' if values.len() > _SHOWN else ''}"
