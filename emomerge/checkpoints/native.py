"""θ₀ + τ rounded once, by a compiled kernel (rounding.c) in a single pass, with the sums of the rounding loss."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from emomerge import native
from emomerge.checkpoints.checkpoint import RoundingLoss
from emomerge.checkpoints.factors import KERNELS, PIECE, Factors
from emomerge.checkpoints.finite import KINDS


def rounded_sum(
    base: Tensor, delta: Tensor | Factors, dtype: torch.dtype, loss: RoundingLoss | None, out: Tensor | None = None
) -> Tensor | None:
    """Return θ₀ + τ in `dtype`, with the bits of torch's operations, and add the rounding error to `loss`.

    None if there is no compiler, a dtype or device is not supported, or a result would not be finite.

    Args:
        base: θ₀ as stored.
        delta: τ, of the same shape, in float32 or as factors.
        dtype: of the result.
        loss: receives the sums, if given.
        out: contiguous memory for the result, of the shape of the base.
    """
    supported = base.dtype in KINDS and dtype in KINDS and base.is_cpu
    if not supported or (library := native.library(KERNELS)) is None or base.shape != delta.shape:
        return None
    if isinstance(delta, Tensor) and (not delta.is_cpu or delta.dtype != torch.float32):
        return None
    base = base.contiguous()
    dense = delta.contiguous() if isinstance(delta, Tensor) else None
    factors = delta.prepared() if isinstance(delta, Factors) else None
    out = torch.empty(base.shape, dtype=dtype) if out is None else out
    parts = native.ranges(base.numel(), PIECE)
    sums = torch.zeros(-(-base.numel() // PIECE), 2, dtype=torch.float64)
    counts = torch.zeros(len(parts), 2, dtype=torch.int64)
    finite = [False] * len(parts)
    inputs = (
        ctypes.c_void_p(base.data_ptr()), KINDS[base.dtype], ctypes.c_void_p(None if dense is None else dense.data_ptr()),
        factors and factors.pointer, ctypes.c_void_p(out.data_ptr()), KINDS[dtype],
    )  # fmt: skip

    def work(index: int) -> None:
        start, stop = parts[index]
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (sums[start // PIECE :], counts[index]))
        finite[index] = library.round_sum(*inputs, ctypes.c_long(start), ctypes.c_long(stop), *pointers) == 0

    native.in_parallel(work, range(len(parts)))
    if not all(finite):
        return None
    if loss is not None:
        moved, unchanged = counts.sum(dim=0).tolist()
        loss.add_sums(moved, unchanged, sums[:, 0].tolist(), sums[:, 1].tolist())
    return out
