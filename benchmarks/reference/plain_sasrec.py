"""A plain PyTorch SASRec, as good as it gets without this project: what `benchmarks/throughput.py` measures against.

Padded backbone (n columns for every sequence), softmax at real targets only, PyTorch's own cross-entropy, dropout and
fused AdamW. The same layers, widths and data as `configs/beauty_dot_product.yaml`.

Legend: B sequences, n positions, D width, N real targets, V items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.data.sequences import Sequences


class Block(nn.Module):
    """Post-norm attention and feed-forward, 4·width inside."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] → [B, n, D]"""
        size, length, width = x_BnD.shape
        q, k, v = self.qkv(x_BnD).view(size, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        a_BnD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(size, length, width)
        x_BnD = self.norm_1(x_BnD + self.dropout(self.out(a_BnD)))
        return self.norm_2(x_BnD + self.dropout(self.outer(F.gelu(self.inner(x_BnD)))))


class PlainSasrec(nn.Module):
    """Item and position embeddings, blocks, tied full softmax at the real targets."""

    def __init__(self, num_items: int, max_len: int, width: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(num_items + 1, width), nn.Embedding(max_len, width)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(blocks)))

    def forward(self, items_Bn: Tensor, targets_Bn: Tensor) -> Tensor:
        """Mean cross-entropy over the real targets (0 is padding)."""
        x_BnD = self.dropout(self.norm(self.items(items_Bn) + self.positions.weight[: items_Bn.shape[1]]))
        states_ND = self.blocks(x_BnD)[targets_Bn > 0]
        return F.cross_entropy(states_ND @ self.items.weight[1:].T, targets_Bn[targets_Bn > 0] - 1)


class PlainTraining:
    """Shuffled batches of `batch_sequences` users' newest histories, padded on the right to max_len."""

    def __init__(self, sequences: Sequences, max_len: int, model: PlainSasrec, batch_sequences: int) -> None:
        self._model, self._size = model, batch_sequences
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        users = np.flatnonzero(sequences.train >= 2)
        length = np.minimum(sequences.train[users].astype(np.int64) - 1, max_len)
        last = sequences.offsets[users] + sequences.train[users] - 1  # only a target
        items, first = sequences.take(last - length, length + 1)
        column = np.arange(max_len)
        index = first[:, None] + column
        real = column < length[:, None]
        pick = np.where(real, index, 0)
        self._inputs = torch.from_numpy(np.where(real, items[pick], 0).astype(np.int64))
        self._targets = torch.from_numpy(np.where(real, items[np.where(real, index + 1, 0)], 0).astype(np.int64))
        self.num_sequences, self.num_targets = len(users), int(length.sum())

    def epoch(self, epoch: int) -> float:
        """One pass over all sequences; the last loss."""
        self._model.train()
        loss = torch.zeros(())
        order = torch.randperm(self.num_sequences, generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(self._size):
            loss = self._model(self._inputs[chosen], self._targets[chosen])
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        return loss.item()
