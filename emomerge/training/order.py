"""The order of training rows: a function of seed and step alone, so that resuming needs no saved state."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from emomerge.numerics.seeds import generator_of


class BatchOrder:
    """An endless stream of row numbers, reshuffled each epoch. A batch may span two epochs.

    Args:
        rows: number of rows of the training split.
        batch_size: rows per batch.
        key: seed of the order; equal keys give equal orders.
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
        """Return the row numbers (batch_size,) of a batch, counted from 0 over the whole run."""
        first = number * self.batch_size
        epochs = range(first // self.rows, (first + self.batch_size - 1) // self.rows + 1)
        stream = torch.cat([self._epoch(epoch) for epoch in epochs])
        start = first - epochs[0] * self.rows
        return stream[start : start + self.batch_size]
