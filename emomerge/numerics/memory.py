"""Free memory: how much there is, and what the C library keeps of it, returned to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

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


def free_memory() -> int:
    """Return the bytes that this process and others it starts may still take, by the machine's and its container's account."""
    free = [_number(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    if not free:  # not Linux: half of all
        free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2] if hasattr(os, "sysconf") else [2**32]
    group = Path("/sys/fs/cgroup")
    limit, used = ("".join(_lines(group / name)) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():  # "max" without a limit
        free.append(int(limit) - int(used))
    return max(0, min(free))


def _lines(file: str | Path) -> list[str]:
    try:
        return Path(file).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
