"""The fast path on the CPU: rules compiled from kernels.c."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.native import in_parallel, library, longs, pointers, threads

REPLACED = "after replacing `.data` of a parameter, create the optimizer again"

KERNELS = Path(__file__).with_name("kernels.c")
SHARE = 2**19
"""Number of elements for which another thread pays off."""

PLAIN = (Tensor, torch.nn.Parameter)
REALS = {torch.float32: "REAL=float", torch.float64: "REAL=double"}


def fits(*tensors: Tensor) -> bool:
    """Return whether compiled kernels can process the tensors: dense, all float32 or all float64, in host memory."""
    if torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    return all(t.dtype == dtype and is_dense(t) for t in tensors) and _compiled(dtype) is not None


def is_dense(t: Tensor) -> bool:
    """Return whether a plain tensor is contiguous in host memory."""
    return type(t) in PLAIN and t.is_cpu and t.is_contiguous()


def run(kernel: str, sizes: Sequence[Sequence[int]], tensors: Sequence[Sequence[Tensor]], scalars: Sequence[float]) -> None:
    """Run a kernel of kernels.c over lists of tensors, on as many threads as torch uses.

    Args:
        kernel: name of the C function.
        sizes: a list for each size argument, with one number per parameter; their product is its number of elements.
        tensors: a list for each tensor argument, with one tensor per parameter.
        scalars: the last arguments of the function.
    """
    compiled = _compiled(tensors[0][0].dtype)
    assert compiled is not None, "ask `fits` first"
    numels = [math.prod(size) for size in zip(*sizes, strict=True)] if len(sizes) > 1 else sizes[0]
    wanted = [numels, *sizes, [1] * len(numels)]
    if not all(list(map(Tensor.numel, column)) in wanted for column in tensors[1:]):  # otherwise C would write out of bounds
        raise BadInput(
            f"{kernel}: gradients or state differ in shape from their parameters",
            fix=REPLACED,
        )
    function = getattr(compiled, kernel)
    last = [ctypes.c_double(value) for value in scalars]

    def work(part: slice) -> None:
        counts = [longs(column[part]) for column in sizes]
        if function(ctypes.c_long(len(counts[0])), *counts, *(pointers(column[part]) for column in tensors), *last):
            raise MemoryError(f"out of memory in {kernel}")

    in_parallel(work, _shares(numels, threads()))


@cache
def _compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    return library(KERNELS, REALS[dtype]) if dtype in REALS else None


def _shares(numels: Sequence[int], most: int) -> list[slice]:
    """Return consecutive tensors for each thread, with about equally many elements; one slice if threads would not pay off."""
    total = sum(numels)
    threads = max(min(most, total // SHARE), 1)
    if threads == 1:
        return [slice(0, len(numels))]
    starts, done = [0], 0
    for index, numel in enumerate(numels):
        if index > starts[-1] and len(starts) < threads and done + numel / 2 >= total * len(starts) / threads:
            starts.append(index)
        done += numel
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(numels)], strict=True)]
