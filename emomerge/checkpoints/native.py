"""θ₀ + τ rounded once, by a compiled kernel (rounding.c) in a single pass, with the sums of the rounding loss."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from emomerge import native
from emomerge.checkpoints.checkpoint import RoundingLoss

KERNELS = Path(__file__).with_name("rounding.c")
PIECE = 2**17
"""Number of elements summed in one double (see rounding.c)."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rounded_sum(base: Tensor, delta: Tensor, dtype: torch.dtype, loss: RoundingLoss | None) -> Tensor | None:
    """Return θ₀ + τ in `dtype`, with the bits of torch's operations, and add the rounding error to `loss`.

    None if there is no compiler, a dtype or device is not supported, or a result would not be finite.

    Args:
        base: θ₀ as stored.
        delta: τ, of the same shape, in float32.
        dtype: of the result.
        loss: receives the sums, if given.
    """
    supported = base.dtype in _KINDS and dtype in _KINDS and delta.dtype == torch.float32
    if not supported or not base.is_cpu or not delta.is_cpu or (library := native.library(KERNELS)) is None:
        return None
    base, delta = base.contiguous(), delta.contiguous()
    pieces = -(-base.numel() // PIECE)
    threads = max(1, min(native.threads(), pieces))
    cuts = [min(pieces * index // threads * PIECE, base.numel()) for index in range(threads + 1)]
    parts = [*pairwise(cuts)]
    sums, counts = torch.zeros(pieces, 2, dtype=torch.float64), torch.zeros(threads, 2, dtype=torch.int64)
    out = torch.empty(base.shape, dtype=dtype)
    finite = [False] * threads

    def work(index: int) -> None:
        start, stop = parts[index]
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (sums[start // PIECE :], counts[index]))
        finite[index] = library.round_sum(
            ctypes.c_void_p(base.data_ptr()), _KINDS[base.dtype], ctypes.c_void_p(delta.data_ptr()),
            ctypes.c_void_p(out.data_ptr()), _KINDS[dtype], ctypes.c_long(start), ctypes.c_long(stop), *pointers,
        ) == 0  # fmt: skip

    native.in_parallel(work, range(threads))
    if not all(finite):
        return None
    if loss is not None:
        moved, unchanged = counts.sum(dim=0).tolist()
        loss.add_sums(moved, unchanged, sums[:, 0].tolist(), sums[:, 1].tolist())
    return out
