"""The ranking loss that a configuration names: which items it needs rows of, and each target's negative log-likelihood.

Legend: M items of the windows, N targets, K shared negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genatt_dist.attention.noise import NoiseKey, Purpose
from genatt_dist.config import LossConfig
from genatt_dist.data.batches import Batch
from genatt_dist.embedding.negatives import Proposal, shared_key, uniform_per_token
from genatt_dist.loss.sampled import bce_nll, sampled_nll


@dataclass(frozen=True)
class Candidates:
    """Items whose rows a step needs, in one list: one lookup, so one update of a fused table.

    ids: int64, the windows' items, then the negatives (none for the full softmax, which scores all rows).
    negatives: int64 [K] shared or [N] one a target. log_expected_K: float32, log K·q of shared ones.
    """

    ids: Tensor
    negatives: Tensor | None = None
    log_expected_K: Tensor | None = None


class Candidature:
    """Draws the candidates of a step for one loss."""

    def __init__(self, loss: LossConfig, num_items: int, popularity_V: Tensor, device: torch.device) -> None:
        self._loss = loss
        self._num_items = num_items
        self._proposal = Proposal(loss.proposal, num_items, popularity_V, device) if loss.kind == "sampled" else None

    def draw(self, batch: Batch, noise: NoiseKey, seed: int, step: int) -> Candidates:
        """The candidates of this rank's part; shared negatives are the same on every rank."""
        if self._loss.kind == "full":
            return Candidates(batch.items_M)
        if self._proposal is not None:
            negatives_K, log_expected_K = self._proposal.draw(shared_key(seed, step), self._loss.num_negatives)
            return Candidates(torch.cat((batch.items_M, negatives_K)), negatives_K, log_expected_K)
        # Samples of the map share their negatives: `noise` has keys for each, the first sample's come first.
        key_N = noise.token(Purpose.NEGATIVE_OF_TOKEN)[: len(batch.layout.row_N)]
        negatives_N = uniform_per_token(key_N, self._num_items)
        return Candidates(torch.cat((batch.items_M, negatives_N)), negatives_N)


def candidate_nll(states_ND: Tensor, rows: Tensor, batch: Batch, candidates: Candidates) -> Tensor:
    """Negative log-likelihood at every position under the sampled or the binary loss: float32 [N].

    rows: the rows of `candidates.ids`.
    """
    assert candidates.negatives is not None
    items_MD, negative_rows = rows[: len(batch.items_M)], rows[len(batch.items_M) :]
    target_rows_ND = items_MD[batch.target_index_N]
    if candidates.log_expected_K is None:
        return bce_nll(states_ND, target_rows_ND, negative_rows, batch.targets_N, candidates.negatives)
    return sampled_nll(
        states_ND, target_rows_ND, negative_rows, batch.targets_N, candidates.negatives, candidates.log_expected_K
    )
