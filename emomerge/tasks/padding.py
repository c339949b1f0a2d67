"""Passes over rows of similar length, so that few of the tokens that a model computes are padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from emomerge.tasks.base import Batch

LARGEST_SMALL = 2**26
"""Parameters of a model whose perturbed weights are kept between the passes of a batch (see `probing.perturb.KEPT_BYTES`)."""
SMALL_PASS, LARGE_PASS = 32, 256
"""What a pass costs besides its tokens, in tokens: products of few rows are slower, and weights that are not kept are made
again for every pass, at the price of some 225 tokens on a core."""
CALLS = 1e8
"""What the calls of a pass cost, in tokens times parameters: 2 ms of a core with 10¹¹ floating-point operations a second."""


def passes_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the numbers of a batch's rows, shortest first, in passes that take the least time together on a CPU.

    On an accelerator, where small passes gain nothing, and in training, where they would draw other random numbers, all rows
    are one pass.

    Args:
        model: evaluates the batch.
        batch: with `attention_mask` (rows, longest), padded on the right.
    """
    mask = batch["attention_mask"]
    if mask.device.type != "cpu" or model.training or len(mask) < 2:
        return [torch.arange(len(mask))]
    lengths, order = mask.sum(dim=1).sort(stable=True)
    parameters = sum(p.numel() for p in model.parameters())
    fixed = (SMALL_PASS if parameters <= LARGEST_SMALL else LARGE_PASS) + CALLS / max(1, parameters)
    return list(order.split(partition(tuple(lengths.tolist()), fixed)))


@lru_cache(maxsize=1024)
def partition(lengths: Sequence[int], fixed: float) -> list[int]:
    """Return the sizes of consecutive groups of rows for which Σ (rows · longest + fixed) is least.

    Args:
        lengths: of the rows, ascending; a tuple.
        fixed: what a group costs besides its rows, in tokens.
    """
    count = len(lengths)
    cost, first = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    places = np.arange(count + 1)
    for end in range(1, count + 1):
        costs = cost[:end] + (end - places[:end]) * lengths[end - 1] + fixed
        first[end] = costs.argmin()
        cost[end] = costs[first[end]]
    sizes, end = [], count
    while end:
        sizes.append(int(end - first[end]))
        end = int(first[end])
    return sizes[::-1]


def narrow_alike(batches: Sequence[Batch], picks: Sequence[Tensor]) -> list[Batch]:
    """Return some rows of each of several batches, all as wide as the longest row of any."""
    width = max(_longest(batch, rows) for batch, rows in zip(batches, picks, strict=True))
    return [narrow(batch, rows, width) for batch, rows in zip(batches, picks, strict=True)]


def _longest(batch: Batch, rows: Tensor) -> int:
    return int(batch["attention_mask"][rows].sum(dim=1).max())


def narrow(batch: Batch, rows: Tensor, width: int | None = None) -> Batch:
    """Return some rows of a batch, by default as wide as the longest of them; fields of one dimension have no width."""
    width = _longest(batch, rows) if width is None else width
    return {name: field[rows] if field.ndim == 1 else field[rows, :width] for name, field in batch.items()}
