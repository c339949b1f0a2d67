"""SHA-256 of files, values and tensors; large files are hashed beside other work, even while torch is still being imported."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 2**26
"""Bytes hashed at a time, which a busy interpreter interrupts only between; a multiple of the system's pages."""


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        for start in range(0, size, WINDOW):
            with mmap.mmap(file.fileno(), min(WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as window:
                digest.update(window)
    return digest.hexdigest()


class Digests:
    """The SHA-256 of any file; some are begun at once, in their order, on a thread of their own.

    Args:
        files: those. One that cannot be read is an error when it is asked for.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._begun: dict[Path, Future[str]] = {file: Future() for file in files}
        Thread(target=self._work, daemon=True).start()

    def __call__(self, file: Path) -> str:
        """The SHA-256 of a file, in hexadecimal; waits for it where it was begun."""
        return self._begun[file].result() if file in self._begun else sha256(file)

    def _work(self) -> None:
        for file, future in self._begun.items():
            try:
                future.set_result(sha256(file))
            except BaseException as error:
                future.set_exception(error)


def digest(value: object) -> str:
    """SHA-256 of a JSON-able value; pydantic models count by their fields. The order of keys counts, as classes need it to."""

    def plain(item: object) -> object:
        return item.model_dump(mode="json") if hasattr(item, "model_dump") else str(item)

    text = json.dumps(value, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names and bytes of tensors, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(name.encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order, from any device."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
