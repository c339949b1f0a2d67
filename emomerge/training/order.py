"""Which rows each step sees, and what its dropout draws: functions of seed and step alone, so that resuming needs no memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from emomerge.numerics.seeds import generator_of


class BatchOrder:
    """An endless stream of row numbers, reshuffled each epoch; batches may straddle two epochs.

    Args:
        rows: rows of the training split.
        batch_size: rows a batch.
        key: what the order depends on; equal keys give equal orders.
    """

    def __init__(self, rows: int, batch_size: int, *key: object) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self._epoch = lru_cache(maxsize=2)(self._shuffle)
        self._key = key

    def _shuffle(self, epoch: int) -> Tensor:
        generator = generator_of("order", *self._key, epoch)
        return torch.randperm(self.rows, generator=generator)

    def batch(self, number: int) -> Tensor:
        """Row numbers (batch_size,) of a batch, counted from 0 over the whole run."""
        first = number * self.batch_size
        epochs = range(first // self.rows, (first + self.batch_size - 1) // self.rows + 1)
        stream = torch.cat([self._epoch(epoch) for epoch in epochs])
        start = first - epochs[0] * self.rows
        return stream[start : start + self.batch_size]
