"""The preparation said again in plain Python, row by row: what the package must equal."""

from collections import Counter
from dataclasses import dataclass

from data_pipeline.config import PrepareConfig

Row = tuple[int | str, int | str, int]  # user, item, time
Sequence = tuple[list[int], list[int]]  # dense ids, times


@dataclass
class Prepared:
    sequences: dict[int | str, Sequence]
    items: list[tuple[int | str | None, int, int, int]]  # original id, dense id, count, train count
    dropped: dict[str, int]


def prepare_slowly(rows: list[Row], config: PrepareConfig) -> Prepared:
    """With leave-one-out, without weights, time range and hash buckets."""
    ordered = [row for _, row in sorted(enumerate(rows), key=lambda pair: (pair[1][0], pair[1][2], pair[0]))]
    clean: list[Row] = []
    for row in ordered:
        exact = config.duplicates == "exact" and row in clean
        again = config.duplicates == "consecutive" and bool(clean) and clean[-1][:2] == row[:2]
        if not exact and not again:
            clean.append(row)

    core = clean
    while True:
        users, items = Counter(user for user, _, _ in core), Counter(item for _, item, _ in core)
        kept = [
            row
            for row in core
            if users[row[0]] >= config.min_user_interactions and items[row[1]] >= config.min_item_interactions
        ]
        if kept == core:
            break
        core = kept

    ranked = sorted(items, key=lambda item: (-items[item], item))
    dense = {item: number + 1 for number, item in enumerate(i for i in ranked if items[i] >= config.min_count)}
    counts: list[tuple[int | str | None, int]] = [(item, items[item]) for item in dense]
    known = core
    if config.out_of_vocabulary == "bucket":
        rare = [item for item in ranked if item not in dense]
        counts.append((None, sum(items[item] for item in rare)))
        dense |= dict.fromkeys(rare, len(dense) + 1)
    else:
        known = [row for row in core if row[1] in dense]
    sequences = {}
    for user in dict.fromkeys(row[0] for row in known):
        mine = [(dense[item], time) for one, item, time in known if one == user]
        mine = mine[-config.max_history :] if config.max_history else mine
        sequences[user] = ([item for item, _ in mine], [time for _, time in mine])
    train: Counter[int] = Counter()
    for ids, _ in sequences.values():
        train.update(ids[:-2] if len(ids) >= 3 else ids)
    left = sum(len(ids) for ids, _ in sequences.values())
    return Prepared(
        sequences,
        [(item, number + 1, count, train[number + 1]) for number, (item, count) in enumerate(counts)],
        {
            "duplicates": len(ordered) - len(clean),
            "core": len(clean) - len(core),
            "below_min_count": len(core) - len(known),
            "beyond_max_history": len(known) - left,
        },
    )
