"""SHA-256 of files, computed beside other work: large files are hashed while libraries are still being imported."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

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


def weight_files(source: str) -> list[Path]:
    """The safetensors files that a checkpoint's folder or name most likely means, found without opening them."""
    path = Path(source)
    if path.is_file():
        return [path]
    whole = path / "model.safetensors"
    return [whole] if whole.is_file() else sorted(path.glob("model-*.safetensors"))
