"""Exact order statistics: the k-th smallest magnitude in a stream of tensors, the largest elements of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGIT = 16
"""Number of bits resolved in one pass over the stream."""

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_magnitude(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int], *, numel: int, dtype: torch.dtype) -> Tensor:
    """Find each row's k-th smallest |x| by counting bit patterns, which sort like the magnitudes.

    Args:
        stream: starts a pass over the pieces (rows, n); there is one pass for every 16 bits of the dtype.
        ranks: k of each row, up to `numel`; a k below 1 gives 0.
        numel: number of elements per row; elements missing from the stream count as zeros, an empty row as one zero.
        dtype: float32 or float64, no narrower than any piece.

    Returns:
        Tensor: (rows,), in `dtype`.
    """
    rows, width = len(ranks), 8 * dtype.itemsize
    left_out = torch.zeros(rows, dtype=torch.int64)
    prefix = torch.zeros(rows, dtype=torch.int64)
    remaining = torch.tensor(ranks)
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(rows, 2**DIGIT, dtype=torch.int64)
        for piece in stream():
            counts, prefix = counts.to(piece.device), prefix.to(piece.device)
            patterns = piece.to(dtype).abs().view(_INTEGERS[dtype])
            for row, pattern in enumerate(patterns):
                if shift + DIGIT < width:
                    pattern = pattern[pattern >> (shift + DIGIT) == prefix[row]]
                digits = (pattern >> shift) & (2**DIGIT - 1)
                counts[row].index_add_(0, digits, counts.new_ones(()).expand(len(digits)))
        counts, prefix = counts.cpu(), prefix.cpu()
        if shift + DIGIT == width:
            left_out = max(numel, 1) - counts.sum(1)
        counts[:, 0] += torch.where(prefix == 0, left_out, 0)
        up_to = counts.cumsum(1)
        digit = torch.searchsorted(up_to, remaining.unsqueeze(1))
        remaining = remaining - (up_to - counts).gather(1, digit).squeeze(1)
        prefix = (prefix << DIGIT) | digit.squeeze(1)
    return prefix.to(_INTEGERS[dtype]).view(dtype)


class Ranked(NamedTuple):
    """The magnitude at a rank."""

    value: float
    equal: int
    """Number of elements with this magnitude."""
    within: int
    """Rank (from 1) among these."""


class Bracket:
    """Find the magnitude at a rank among many float32 values in one pass: count those outside a bracket, keep the few inside.

    A sample gives the bracket (Floyd and Rivest 1975). Magnitudes are compared by their bit patterns, which sort the same way.

    Args:
        low, high: bit patterns of the bracket's ends; −1 and 2³¹ − 1 leave a side open.
        room: number of patterns that one call of `add` may keep.
    """

    def __init__(self, low: int, high: int, room: int) -> None:
        self.low, self.high, self.room = low, high, room
        self._below = self._lowest = self._highest = 0
        self._inside: list[NDArray[np.int32]] | None = []

    @classmethod
    def of(cls, sample: NDArray[np.int32], rank: int, numel: int) -> Bracket:
        """Return a bracket that probably contains a rank (from 1) among `numel` elements, given the magnitudes of a sample."""
        size = len(sample)
        place, margin = rank * size // numel, 2 * math.isqrt(size) + 1  # 4 standard deviations or more
        left, right = max(place - margin, -1), min(place + margin, size)
        ends = [end for end in (left, right) if 0 <= end < size]
        sorted_there = np.partition(sample, ends) if ends else sample
        low = -1 if left < 0 else int(sorted_there[left])
        high = 2**31 - 1 if right == size else int(sorted_there[right])
        return cls(low, high, 2 * numel * (right - left) // size + 4096)

    def add(self, counts: Sequence[int], inside: NDArray[np.int32]) -> None:
        """Add counts of elements below `low`, equal to it, equal to `high` and inside, and as many patterns inside as fit."""
        below, lowest, highest, held = counts
        self._below, self._lowest, self._highest = self._below + below, self._lowest + lowest, self._highest + highest
        if self._inside is not None:
            self._inside.append(inside[:held].copy())
        if held > len(inside):
            self._inside = None

    def equal(self, value: float, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of elements in each piece that equal a value that was found (pieces,).

        Args:
            value: a value inside the bracket, or one of its ends.
            counts: (pieces, 4) as for `add`, for everything that was added.
        """
        pattern = np.float32(value).view(np.int32)
        if pattern in (self.low, self.high):
            return counts[:, 1 if pattern == self.low else 2]
        hits = np.flatnonzero(np.concatenate(self._inside or []) == pattern)
        return np.bincount(np.searchsorted(counts[:, 3].cumsum(), hits, side="right"), minlength=len(counts))

    def find(self, rank: int) -> Ranked | None:
        """Return the magnitude at a rank among all elements added; None if it lies outside the bracket."""
        inside = None if self._inside is None else np.concatenate([np.empty(0, np.int32), *self._inside])
        if inside is None or (rank := rank - self._below) < 1:
            return None
        if rank <= self._lowest:
            return Ranked(_magnitude(self.low), self._lowest, rank)
        if (rank := rank - self._lowest) <= len(inside):
            pattern = np.partition(inside, rank - 1)[rank - 1]
            return Ranked(_magnitude(pattern), int((inside == pattern).sum()), rank - int((inside < pattern).sum()))
        if (rank := rank - len(inside)) <= self._highest and self.low < self.high:
            return Ranked(_magnitude(self.high), self._highest, rank)
        return None


def sample_step(numel: int) -> int:
    """Return the stride of a sample of about n^⅔ of n elements; odd, so that every column is sampled."""
    return int(numel ** (1 / 3)) | 1


def _magnitude(pattern: int | np.int32) -> float:
    return float(np.int32(pattern).view(np.float32))


SAMPLE = 2**14
"""Size of the sample that gives the bracket."""


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of a flat tensor, k from 1: `kthvalue` on a bracket of it (Floyd and Rivest 1975).

    A sample brackets the value, the elements below the bracket are counted, and only those inside are searched; if the
    bracket misses the value, all elements are searched. The result is exact.
    """
    n = len(values)
    if n > 4 * SAMPLE:
        sample = values[:: n // SAMPLE].sort().values
        place, margin = k * len(sample) // n, 4 * int(SAMPLE**0.5)
        low = sample[max(place - margin, 0)] if place > margin else values.new_tensor(-torch.inf)
        high = sample[place + margin] if place + margin < len(sample) else values.new_tensor(torch.inf)
        inside = values[(values >= low) & (values <= high)]
        rank = k - int((values < low).count_nonzero())
        if 1 <= rank <= len(inside):
            return inside.kthvalue(rank).values
    return values.kthvalue(k).values


class Cut(NamedTuple):
    """A selection by magnitude: elements above the threshold, or equal to it up to the index `last`. Both are (rows, 1)."""

    threshold: Tensor
    last: Tensor | None = None
    """None if all elements equal to the threshold are included."""

    def mask(self, values: Tensor, offset: int = 0) -> Tensor:
        """Return the mask for elements (rows, n) that start at `offset`."""
        size, threshold = values.abs(), self.threshold.to(values.device)
        if self.last is None:
            return size >= threshold
        place = torch.arange(offset, offset + values.shape[1], device=values.device)
        return (size > threshold) | ((size == threshold) & (place <= self.last.to(values.device)))


def largest(rows: Sequence[Tensor], counts: Sequence[int]) -> Cut:
    """Select the `counts` largest elements of each flat row, the first ones in case of ties."""
    found = [_largest(row, count) for row, count in zip(rows, counts, strict=True)]
    threshold, last = torch.stack([threshold for threshold, _ in found]), [last for _, last in found]
    all_equal = all(place == len(row) for row, place in zip(rows, last, strict=True))
    return Cut(threshold.unsqueeze(1), None if all_equal else torch.tensor(last).unsqueeze(1))


def _largest(row: Tensor, count: int) -> tuple[Tensor, int]:
    """Return the threshold of one row, and the last index of an element equal to it that is selected."""
    n = len(row)
    if count >= n or count <= 0:
        return row.new_tensor(0 if count > 0 else torch.inf), n
    magnitudes = row.abs()
    threshold = kth_smallest(magnitudes, n - count + 1)
    missing = count - int((magnitudes > threshold).count_nonzero())
    equal = magnitudes == threshold
    return threshold, n if int(equal.count_nonzero()) == missing else int(equal.nonzero()[missing - 1])
