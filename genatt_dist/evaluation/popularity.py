"""The popularity baseline: the same ranking for everybody, most interactions in the training part first."""

from __future__ import annotations

import numpy as np
import torch

from genatt_dist.config import RunConfig
from genatt_dist.data.histories import evaluation_batches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.table import rank_rows
from genatt_dist.evaluation.categories import categories_of
from genatt_dist.evaluation.diversity import Lists
from genatt_dist.evaluation.evaluate import Result, query, result
from genatt_dist.evaluation.metrics import CUTOFFS


def evaluate_popularity(sequences: Sequences, split: str, config: RunConfig) -> Result:
    """Rank by popularity through the ranking that models use: a state of width 1 and each item's place as its row.

    Places, not counts: items of equal count have a fixed order, so the list of k is well defined. It is drawn by
    chance, because dense ids follow all counts and would tell the held-out ones.
    """
    chance = np.random.default_rng(0).permutation(sequences.num_items)
    order = np.lexsort((chance, -sequences.popularity[1:]))
    place = np.empty(sequences.num_items, np.float64)
    place[order] = np.arange(sequences.num_items, 0, -1)
    rows_VD = torch.from_numpy(place)[:, None]
    device = torch.device("cpu")
    rank_U = np.zeros(sequences.num_users, np.int64)
    categories = categories_of(sequences, config.evaluation.category_column, device)
    lists = Lists(sequences.popularity, categories, device)
    for histories in evaluation_batches(sequences, split, 1, config.evaluation.batch_users, 0, 1, device):
        states_BD = torch.ones(len(histories.user_B), 1, dtype=torch.float64)
        ranking = rank_rows(
            rows_VD,
            query(states_BD, histories, config.evaluation.exclude_seen, sequences.manifest.out_of_vocabulary),
            max(CUTOFFS),
            config.evaluation.chunk_items,
        )
        rank_U[histories.user_B.numpy()] = ranking.ahead_B.numpy() + 1
        lists.add(ranking.top_Bk)
    return result(rank_U, lists)
