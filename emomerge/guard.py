"""Mapped files that another process truncates: reading beyond their new end goes on with zeros and does not end the process.

The system sends SIGBUS to a process that reads a page of a map beyond the end of its file. A small handler in C (guard.c)
puts a page of zeros there. What was read is then wrong, but the command finds at its end that the file changed, and says so.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from emomerge import native, watch

SOURCE = Path(__file__).with_name("guard.c")


def is_safe_to_map() -> bool:
    """Return whether a file may be mapped: not if this block watches its inputs and cannot survive one that is truncated."""
    if not watch.is_watching() or sys.platform == "win32":  # Windows does not truncate files that are mapped
        return True
    return watch.hold(_survive) if native.library(SOURCE) is not None else False


@contextlib.contextmanager
def _survive() -> Iterator[None]:
    """Replace lost pages while the block runs. Raises BadInput at its end if there were some."""
    library = native.library(SOURCE)
    assert library is not None
    library.guard_start()
    try:
        yield
    finally:
        replaced = library.guard_stop()
    if replaced:
        watch.require_unchanged()
