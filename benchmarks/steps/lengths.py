"""How long the histories of a benchmark are: all of them max_len, or as long as amazon-beauty's training windows.

The histogram beside the benchmarks makes Beauty's law available without Beauty. It was written by

    python -m benchmarks.steps.lengths --shards shards/amazon-beauty --out benchmarks/beauty_lengths.json

and is not cut at any max_len: with `data.windows=last` the law at max_len n is min(length, n).
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HISTOGRAM = Path(__file__).parents[1] / "beauty_lengths.json"
LAWS = ("all_n", "beauty")


def draw(law: str, count: int, max_len: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` lengths of histories of at most `max_len` positions: int64 [count], each ≥ 1."""
    if law == "all_n":
        return np.full(count, max_len, np.int64)
    length, share = _beauty()
    return np.minimum(random.choice(length, count, p=share), max_len)


@cache
def _beauty() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    counts = {int(length): number for length, number in json.loads(HISTOGRAM.read_text())["counts"].items()}
    number = np.array(list(counts.values()), np.float64)
    return np.array(list(counts), np.int64), number / number.sum()


def main() -> None:
    """Count the training positions of every user of a prepared data set."""
    from genatt_dist.data.sequences import Sequences

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="what `genatt prepare` published")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sequences = Sequences.read(arguments.shards)
    # The last training item is a target only, so a user of m training items has m − 1 positions.
    positions = sequences.train.astype(np.int64) - 1
    length, number = np.unique(positions[positions >= 1], return_counts=True)
    result = {
        "command": f"python -m benchmarks.steps.lengths --shards shards/{sequences.manifest.name} --out FILE",
        "what": "users by positions of their training window (leave-one-out, data.windows=last, not cut at max_len)",
        "items": sequences.num_items,
        "counts": dict(zip(map(str, length.tolist()), number.tolist(), strict=True)),
    }
    arguments.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
