"""The three sums of `geom_relation` in one Triton kernel, for CUDA. Needs triton, which torch's CUDA builds bring along."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PROGRAMS = 1024
"""At most so many programs share a tensor: enough to fill any GPU, few enough that adding up their sums costs nothing."""


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _products_kernel(w_pointer, g_pointer, sums, n, block: tl.constexpr, real: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program adds up every PROGRAMS-th block, in a fixed order."""
    wg = tl.zeros([block], dtype=real)
    ww = tl.zeros([block], dtype=real)
    gg = tl.zeros([block], dtype=real)
    for start in range(tl.program_id(0) * block, n, tl.num_programs(0) * block):
        at = start + tl.arange(0, block)
        w = tl.load(w_pointer + at, mask=at < n, other=0.0).to(real)
        g = tl.load(g_pointer + at, mask=at < n, other=0.0).to(real)
        wg += w * g
        ww += w * w
        gg += g * g
    row = sums + 3 * tl.program_id(0)
    tl.store(row, tl.sum(wg))
    tl.store(row + 1, tl.sum(ww))
    tl.store(row + 2, tl.sum(gg))


def products(w: Tensor, g: Tensor) -> Tensor:
    """Return ⟨W, G⟩, ‖W‖² and ‖G‖² of contiguous tensors, shape (3,), in float64 for float64 and else in float32.

    Each program writes its own sums and torch adds them up, so the result does not depend on which program ends first.
    """
    double = w.dtype == torch.float64
    programs = max(min(triton.cdiv(w.numel(), BLOCK), PROGRAMS), 1)
    sums = torch.empty(programs, 3, device=w.device, dtype=torch.float64 if double else torch.float32)
    _products_kernel[(programs,)](w, g, sums, w.numel(), block=BLOCK, real=tl.float64 if double else tl.float32)
    return sums.sum(0)
