"""Reads MovieLens archives: three layouts of GroupLens' own, and that of RecBole's example data."""

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
TYPES = [pl.Int64, pl.Int64, pl.Float64, pl.Int64]
GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
NO_GENRES = "(no genres listed)"


def read_100k(paths: list[Path | None], directory: Path) -> None:
    """ml-100k: tab-separated ratings, and items with one flag a genre."""
    with _archive(paths) as archive:
        _write_tab_separated(archive.read("ml-100k/u.data"), directory)
        text = archive.read("ml-100k/u.item").decode("latin-1").encode()
    raw = pl.read_csv(text, separator="|", has_header=False, infer_schema=False, quote_char=None)
    item_id, title, _, _, _, *flags = raw.columns
    named = [pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, GENRES, strict=True)]
    _write_items(raw, pl.col(item_id), pl.col(title), pl.concat_list(named).list.drop_nulls(), directory)


def read_recbole_wheel(paths: list[Path | None], directory: Path) -> None:
    """The same rows and items from RecBole's example data: `u.data` under a header line."""
    with _archive(paths) as archive:
        _write_tab_separated(
            archive.read("recbole/dataset_example/ml-100k/ml-100k.inter").partition(b"\n")[2], directory
        )
        text = archive.read("recbole/dataset_example/ml-100k/ml-100k.item")
    raw = pl.read_csv(text, separator="\t", infer_schema=False, quote_char=None)
    item_id, title, year, genres = (pl.col(name) for name in raw.columns)
    _write_items(raw, item_id, pl.format("{} ({})", title, year), genres.str.split(" "), directory)


def read_1m(paths: list[Path | None], directory: Path) -> None:
    """ml-1m: `::` between fields, which no CSV reader takes, and titles in Latin-1."""
    with _archive(paths) as archive:
        ratings = _split(archive.read("ml-1m/ratings.dat"), COLUMNS)
        movies = _split(archive.read("ml-1m/movies.dat"), ["item_id", "title", "genres"])
    ratings = ratings.select(pl.col(name).cast(kind) for name, kind in zip(COLUMNS, TYPES, strict=True))
    ratings.write_parquet(directory / "interactions.parquet")
    _write_items(movies, pl.col("item_id"), pl.col("title"), pl.col("genres").str.split("|"), directory)


def read_csv(name: str, paths: list[Path | None], directory: Path) -> None:
    """ml-20m and later: CSV with a header, streamed from the archive in blocks."""
    names = ["userId", "movieId", "rating", "timestamp"]
    types = dict(zip(names, (pa.int64(), pa.int64(), pa.float64(), pa.int64()), strict=True))
    with _archive(paths) as archive:
        schema = pa.schema(zip(COLUMNS, types.values(), strict=True))
        with (
            archive.open(f"{name}/ratings.csv") as member,
            pyarrow.csv.open_csv(
                member,
                pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 24),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, include_columns=names),
            ) as reader,
            pq.ParquetWriter(directory / "interactions.parquet", schema, compression="zstd") as writer,
        ):
            for batch in reader:
                writer.write_batch(batch.rename_columns(COLUMNS))
        raw = pl.read_csv(archive.read(f"{name}/movies.csv"), infer_schema=False)
    genres = pl.col("genres").replace(NO_GENRES, None).str.split("|").fill_null([])
    _write_items(raw, pl.col("movieId"), pl.col("title"), genres, directory)


READERS: dict[str, Callable[[list[Path | None], Path], None]] = {"ml-100k": read_100k, "ml-1m": read_1m}
READERS |= {name: partial(read_csv, name) for name in ("ml-20m", "ml-25m", "ml-32m")}


def _archive(paths: list[Path | None]) -> zipfile.ZipFile:
    (path,) = paths
    if path is None:
        raise ValueError("an archive is not optional")
    return zipfile.ZipFile(path)


def _split(content: bytes, names: list[str]) -> pl.DataFrame:
    lines = pl.DataFrame({"line": content.decode("latin-1").rstrip("\n").split("\n")})
    fields = pl.col("line").str.split_exact("::", len(names) - 1).struct.rename_fields(names)
    return lines.select(fields).unnest("line")


def _write_tab_separated(rows: bytes, directory: Path) -> None:
    table = pl.read_csv(rows, separator="\t", has_header=False, new_columns=COLUMNS, schema_overrides=TYPES)
    table.write_parquet(directory / "interactions.parquet")


def _write_items(raw: pl.DataFrame, item_id: pl.Expr, title: pl.Expr, genres: pl.Expr, directory: Path) -> None:
    items = raw.select(item_id=item_id.cast(pl.Int64), title=title, genres=genres)
    items.write_parquet(directory / "items.parquet")
