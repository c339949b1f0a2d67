"""Sections on a number of threads, for results that would depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread: matrix products and decompositions round differently with other numbers of threads."""
    with threads(1):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block on some threads, or on as many as torch has if these are fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
