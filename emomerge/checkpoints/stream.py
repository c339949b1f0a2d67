"""Bytes written to a file from large buffers that are used again and again, while the next ones are computed.

Fresh pages cost as much time as the arithmetic on them, and so does a copy into the system's cache. Large files are therefore
written past the cache (O_DIRECT) where the file system allows it; others are written, and flushed, as usual.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

CHUNK = 2**23
"""Bytes that are written at a time, unless a tensor is larger."""
KEPT = 2**26
"""Size of the largest buffer that is kept."""
WAITING = 2
"""Number of buffers that may wait to be written."""
LARGE = 2**26
"""Size of the smallest file that is written past the cache."""
ALIGNMENT = 4096
"""What O_DIRECT wants positions, sizes and addresses to be multiples of."""
FLUSHED = 2**27
"""Bytes in the cache after which they are flushed to the disk, in the background."""


class Stream:
    """A file that is written in order; use as a context manager.

    Args:
        path: the file; one that is there is replaced.
        size: bytes that will be written.
        hashed: whether to compute the SHA-256.

    Attributes:
        sha256: in hexadecimal, after `finish`; empty if it was not asked for.
    """

    def __init__(self, path: Path, size: int, *, hashed: bool) -> None:
        self.sha256 = ""
        self._file, self._direct = _opened(path, size)
        self._digest = hashlib.sha256() if hashed else None
        self._writer, self._hasher, self._flusher = (ThreadPoolExecutor(1) for _ in range(3))
        self._waiting: deque[tuple[mmap.mmap, list[Future[None]]]] = deque()
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._buffer, self._filled = _new_buffer(min(CHUNK + size, 2 * CHUNK)), 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._writer, self._hasher, self._flusher):
            pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def reserve(self, size: int) -> memoryview:
        """Return the memory of the next `size` bytes, for the caller to fill before it calls `commit`."""
        if self._filled + size > len(self._buffer):
            self._pass_on()
        if self._filled + size > len(self._buffer):
            larger = _new_buffer(self._filled + size)
            larger[: self._filled] = self._buffer[: self._filled]
            self._buffer = larger
        return memoryview(self._buffer)[self._filled : self._filled + size]

    def commit(self, size: int) -> None:
        """Take the reserved bytes as written."""
        self._filled += size
        if self._filled >= CHUNK:
            self._pass_on()

    def put(self, data: bytes) -> None:
        """Write bytes."""
        self.reserve(len(data))[:] = data
        self.commit(len(data))

    def finish(self) -> None:
        """Write what is left, and flush the file to the disk. Raises OSError if any of it failed."""
        self._pass_on()
        while self._waiting:
            self._wait()
        if self._flushing is not None:
            self._flushing.result()
        self._use_cache()
        rest = memoryview(self._buffer)[: self._filled]
        _write_all(self._file, rest)
        os.fsync(self._file.fileno())
        if self._digest is not None:
            self._digest.update(rest)
            self.sha256 = self._digest.hexdigest()

    def _pass_on(self) -> None:
        """Have the buffer written up to the last position that the file can be written to; go on with another one."""
        size = self._filled - (self._filled % ALIGNMENT if self._direct else 0)
        if not size:
            return
        full, rest = self._buffer, self._buffer[size : self._filled]
        work = [self._writer.submit(self._write, full, size)]
        if self._digest is not None:
            work.append(self._hasher.submit(self._hash, full, size))
        self._waiting.append((full, work))
        self._buffer, self._filled = self._free_buffer(), len(rest)
        self._buffer[: len(rest)] = rest

    def _free_buffer(self) -> mmap.mmap:
        while len(self._waiting) > WAITING:
            buffer = self._wait()
            if len(buffer) <= KEPT:
                return buffer
        return _new_buffer(2 * CHUNK)

    def _wait(self) -> mmap.mmap:
        """Wait until the oldest buffer is written; return it."""
        buffer, work = self._waiting.popleft()
        for each in work:
            each.result()
        return buffer

    def _hash(self, buffer: mmap.mmap, size: int) -> None:
        assert self._digest is not None
        with memoryview(buffer)[:size] as data:
            self._digest.update(data)

    def _write(self, buffer: mmap.mmap, size: int) -> None:
        start = self._file.tell()
        with memoryview(buffer)[:size] as data:
            try:
                _write_all(self._file, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._use_cache()  # the file system has other wishes about alignment
                _write_all(self._file, data[self._file.tell() - start :])
        self._unflushed += size
        if not self._direct and self._unflushed > FLUSHED and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing, self._unflushed = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def _use_cache(self) -> None:
        """Write through the system's cache from now on."""
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False


def _opened(path: Path, size: int) -> tuple[io.FileIO, bool]:
    """Create a file, and return whether it is written past the cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if size >= LARGE and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # such as tmpfs
            return io.FileIO(os.open(path, flags | os.O_DIRECT, 0o666), "wb"), True
    return path.open("wb", buffering=0), False


def _new_buffer(size: int) -> mmap.mmap:
    """Return memory that begins at a page."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    buffer = mmap.mmap(-1, max(size, 1), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all of `data`; one system call may write less (2 GiB at most on Linux)."""
    while data:
        data = data[file.write(data) or 0 :]
