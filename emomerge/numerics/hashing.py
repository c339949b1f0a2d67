"""SHA-256 of files, values and tensors. Files can be hashed in the background, even while torch is being imported."""

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
"""Bytes hashed at a time without holding the interpreter lock; a multiple of the system's page size."""


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        for start in range(0, size, WINDOW):
            with mmap.mmap(file.fileno(), min(WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as window:
                digest.update(window)
    return digest.hexdigest()


class Digests:
    """The SHA-256 of any file, with some files hashed in advance by a background thread.

    Args:
        files: the files to hash in advance, in this order. An unreadable file raises only when its hash is requested.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._futures: dict[Path, Future[tuple[str, tuple[int, ...]]]] = {file: Future() for file in files}
        Thread(target=self._work, daemon=True).start()

    def __call__(self, file: Path) -> str:
        """Return the SHA-256 of a file, in hexadecimal; wait for it if it is being hashed in the background."""
        if file in self._futures:
            digest, hashed = self._futures[file].result()
            if hashed == _version(file):  # else it was replaced before it was opened
                return digest
        return sha256(file)

    def _work(self) -> None:
        for file, future in self._futures.items():
            try:
                version = _version(file)
                future.set_result((sha256(file), version))
            except BaseException as error:
                future.set_exception(error)


def _version(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON-compatible value or pydantic model; the order of keys counts, as that of classes does."""

    def plain(item: object) -> object:
        return item.model_dump(mode="json") if hasattr(item, "model_dump") else str(item)

    text = json.dumps(value, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over the names and bytes of tensors, in the given order."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(name.encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in order, from any device."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
