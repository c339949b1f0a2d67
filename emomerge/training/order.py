"""Which rows each step sees, and what its dropout draws: functions of seed and step alone, so that resuming needs no memory."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed from names and numbers, the same on every machine and for every hash seed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed`, which on the CPU costs a third of a millisecond for the sake of devices that are not used."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
        generator = torch.Generator().manual_seed(seed_of("order", *self._key, epoch))
        return torch.randperm(self.rows, generator=generator)

    def batch(self, number: int) -> Tensor:
        """Row numbers (batch_size,) of a batch, counted from 0 over the whole run."""
        first = number * self.batch_size
        epochs = range(first // self.rows, (first + self.batch_size - 1) // self.rows + 1)
        stream = torch.cat([self._epoch(epoch) for epoch in epochs])
        start = first - epochs[0] * self.rows
        return stream[start : start + self.batch_size]
