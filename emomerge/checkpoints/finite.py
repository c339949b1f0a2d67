"""Whether all elements of a tensor are finite."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from emomerge import native
from emomerge.checkpoints.factors import KERNELS, PIECE

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`enum kind` of native.h."""


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype in KINDS and tensor.is_cpu and tensor.is_contiguous() and (library := native.library(KERNELS)) is not None:
        start, kind = ctypes.c_void_p(tensor.data_ptr()), KINDS[tensor.dtype]
        parts = native.ranges(tensor.numel(), PIECE)
        found = [False] * len(parts)

        def work(index: int) -> None:
            found[index] = library.are_finite(start, kind, *map(ctypes.c_long, parts[index])) == 1

        native.in_parallel(work, range(len(parts)))
        return all(found)
    if tensor.dtype.itemsize == 1:  # FP8 has no minimum on some devices
        tensor = tensor.float()
    least, greatest = torch.aminmax(tensor)  # both show there, so no copy is needed
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
