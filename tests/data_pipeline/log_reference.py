"""The preparation said again in plain Python, row by row: what the package must equal."""

from collections import Counter
from dataclasses import dataclass

Row = tuple[int | str, int | str, int]  # user, item, time


@dataclass
class Prepared:
    sequences: dict[int | str, tuple[list[int], list[int]]]  # user -> dense ids, times
    items: list[tuple[int | str, int, int, int]]  # original id, dense id, count, train count
    dropped_duplicates: int
    dropped_by_core: int


def prepare_slowly(rows: list[Row], duplicates: str, min_user: int, min_item: int) -> Prepared:
    ordered = [row for _, row in sorted(enumerate(rows), key=lambda pair: (pair[1][0], pair[1][2], pair[0]))]
    clean: list[Row] = []
    for row in ordered:
        exact = duplicates == "exact" and row in clean
        again = duplicates == "consecutive" and bool(clean) and clean[-1][:2] == row[:2]
        if not exact and not again:
            clean.append(row)

    core = clean
    while True:
        users, items = Counter(user for user, _, _ in core), Counter(item for _, item, _ in core)
        kept = [row for row in core if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if kept == core:
            break
        core = kept

    ranked = sorted(items, key=lambda item: (-items[item], item))
    dense = {item: number + 1 for number, item in enumerate(ranked)}
    sequences = {
        user: ([dense[i] for u, i, _ in core if u == user], [t for u, _, t in core if u == user]) for user in users
    }
    train: Counter[int] = Counter()
    for ids, _ in sequences.values():
        train.update(ids[:-2] if len(ids) >= 3 else ids)
    vocabulary = [(item, dense[item], items[item], train[dense[item]]) for item in ranked]
    return Prepared(sequences, vocabulary, len(ordered) - len(clean), len(clean) - len(core))
