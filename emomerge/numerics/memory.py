"""Free memory that the C library keeps, returned to the system."""

from __future__ import annotations

import ctypes
import sys

ENOUGH = 2**28
"""Bytes of free memory that are worth returning: less is reused faster than the system provides new pages."""


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def release_free_memory() -> None:
    """Return free pages of the heap to the system if there are many, where the C library can (glibc).

    It keeps freed blocks of up to 32 MB, the size of most tensors, for itself. In a stream of tensors of different sizes they
    fit the next ones badly, and the heap grows without bound.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim, describe = getattr(library, "malloc_trim", None), getattr(library, "mallinfo2", None)
    if trim is None:
        return
    if describe is not None:  # since glibc 2.33
        describe.restype = _Info
        if describe().fordblks < ENOUGH:
            return
    trim(ctypes.c_size_t(0))
