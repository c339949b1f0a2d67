"""The exact k-th smallest magnitude of a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

DIGIT = 16
"""Bits counted in one reading of the stream."""

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_magnitude(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int], *, numel: int, dtype: torch.dtype) -> Tensor:
    """Each row's k-th smallest |x|: the bit patterns of magnitudes sort as the magnitudes do, so counting finds it.

    Args:
        stream: starts a reading of the pieces (rows, n); there is one reading for every 16 bits of the dtype.
        ranks: k of each row, up to `numel`; a k below 1 gives 0.
        numel: elements of a row; those that the stream leaves out are zeros, and so is the one of an empty row.
        dtype: float32 or float64, no narrower than any piece.

    Returns:
        Tensor: (rows,), of that dtype.
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
