"""The ranking loss that a configuration names: which items it needs rows of, and each target's negative log-likelihood.

Legend: M items of the windows, N positions of the batch, T trained ones among them (all, or the chosen ones), K
negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genatt_dist.attention.noise import NoiseKey, Purpose
from genatt_dist.config import LossConfig
from genatt_dist.data.batches import Batch
from genatt_dist.embedding.exchange import gather_all
from genatt_dist.embedding.negatives import Proposal, shared_key, uniform_ids
from genatt_dist.loss.sampled import binary_nll, gbce_beta, own_scores, sampled_nll

# Scores of shared negatives that exist at one time, by device. Only batches with very many of them need more than one
# chunk.
SCORES_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


@dataclass(frozen=True)
class Candidates:
    """Items whose rows a step needs, in one list: one lookup, so one update of a fused table.

    ids: int64, the windows' items, then the negatives (none for the full softmax, which scores all rows).
    negatives: int64, [K] shared ones or [T, K] of each trained target. index_TK: where own ones stand among the ids
    that follow the windows' items. log_expected: float32, log K·q as `negatives`; None for the binary losses. beta:
    weight of the target in those.
    """

    ids: Tensor
    negatives: Tensor | None = None
    index_TK: Tensor | None = None
    log_expected: Tensor | None = None
    beta: float = 1.0


class Candidature:
    """Draws the candidates of a step for one loss."""

    def __init__(self, loss: LossConfig, num_items: int, popularity_V: Tensor, device: torch.device) -> None:
        """popularity_V: how often each item stands in the training parts."""
        self._loss, self._num_items = loss, num_items
        self._proposal = Proposal(loss.proposal, num_items, popularity_V, device) if loss.kind == "sampled" else None
        self._beta = gbce_beta(loss.num_negatives, num_items, loss.calibration) if loss.kind == "gbce" else 1.0

    def draw(self, batch: Batch, noise: NoiseKey, seed: int, step: int) -> Candidates:
        """The candidates of this rank's part; shared negatives are the same on every rank. Collective when they are
        the batch's targets.
        """
        loss, items_M = self._loss, batch.items_M
        if loss.kind == "full":
            return Candidates(items_M)
        if self._proposal is not None and loss.proposal == "in_batch":
            targets_G = gather_all(trained(batch, batch.targets_N))
            negatives_K, lowered_K = self._proposal.of_targets(targets_G, loss.logq)
            return Candidates(torch.cat((items_M, negatives_K)), negatives_K, log_expected=lowered_K)
        if loss.shares_negatives:
            negatives, log_expected = self._draw(shared_key(seed, step, items_M.device))
            log_expected = None if log_expected is None else log_expected[0]
            return Candidates(torch.cat((items_M, negatives[0])), negatives[0], None, log_expected, self._beta)
        # Samples of the map share their negatives: `noise` has keys for each, the first sample's come first.
        key_N = noise.token(Purpose.NEGATIVE_OF_TOKEN)[: len(batch.layout.row_N)]
        negatives, log_expected = self._draw(trained(batch, key_N))
        ids_U, index_TK = negatives.unique(return_inverse=True)
        return Candidates(torch.cat((items_M, ids_U)), negatives, index_TK, log_expected, self._beta)

    def _draw(self, key_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """K ids a key and what their scores are lowered by: [N, K] both, None for the binary losses."""
        if self._proposal is None:
            count = 1 if self._loss.kind == "bce" else self._loss.num_negatives
            return uniform_ids(key_N, count, self._num_items), None
        negatives_NK, log_expected_NK = self._proposal.draw(key_N, self._loss.num_negatives)
        return negatives_NK, log_expected_NK if self._loss.logq else torch.zeros_like(log_expected_NK)


def candidate_nll(states_TD: Tensor, rows: Tensor, batch: Batch, candidates: Candidates) -> Tensor:
    """Negative log-likelihood of every trained target under the sampled or a binary loss: float32 [T].

    states_TD: at the trained positions. rows: the rows of `candidates.ids`.
    """
    items_MD, negative_rows = rows[: len(batch.items_M)], rows[len(batch.items_M) :]
    target_rows_TD = items_MD[trained(batch, batch.target_index_N)]
    target_T = (states_TD * target_rows_TD).sum(-1).float()
    targets_T1, negatives = trained(batch, batch.targets_N)[:, None], candidates.negatives
    assert negatives is not None
    if candidates.index_TK is not None:
        scores_TK = own_scores(states_TD, negative_rows, candidates.index_TK).float()
        return _nll(target_T, scores_TK, targets_T1 == negatives, candidates)

    def of_chunk(states_CD: Tensor, target_C: Tensor, targets_C1: Tensor) -> Tensor:
        return _nll(target_C, (states_CD @ negative_rows.T).float(), targets_C1 == negatives, candidates)

    size = max(1, SCORES_BYTES[rows.device.type] // (4 * len(negatives)))
    if len(states_TD) <= size:
        return of_chunk(states_TD, target_T, targets_T1)
    parts = zip(states_TD.split(size), target_T.split(size), targets_T1.split(size), strict=True)
    return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def trained(batch: Batch, x_N: Tensor) -> Tensor:
    """Of something at every position: that at the trained ones."""
    return x_N if batch.chosen is None else x_N[batch.chosen]


def _nll(target_T: Tensor, negative_TK: Tensor, hit_TK: Tensor, candidates: Candidates) -> Tensor:
    if candidates.log_expected is None:
        return binary_nll(target_T, negative_TK, hit_TK, candidates.beta)
    return sampled_nll(target_T, negative_TK, hit_TK, candidates.log_expected)
