"""Free memory that the C library keeps, returned to the system."""

from __future__ import annotations

import ctypes
import sys


def release_free_memory() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc).

    It keeps freed blocks of up to 32 MB, the size of most tensors, for itself. In a stream of tensors of different sizes they
    fit the next ones badly, and the heap grows without bound.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
