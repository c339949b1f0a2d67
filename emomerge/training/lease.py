"""Leases of run directories: one process at a time works in a directory, across all machines of a shared file system.

A lease is a file, created atomically, that names host and process and is touched every few seconds. It ends with its process:
immediately on the same machine; on others, once they have seen no heartbeat for `DURATION` by their own clock, so that clocks
need not agree.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emomerge.checkpoints import atomic
from emomerge.errors import EmomergeError

if TYPE_CHECKING:
    from filelock import SoftFileLease

DURATION, HEARTBEAT = 120.0, 15.0
"""Seconds; network file systems may show a heartbeat a minute late."""


class LeaseLost(EmomergeError):
    """This process paused for so long that another one took over its run directory."""


@dataclass(frozen=True)
class Holder:
    """The process that works in a run directory.

    Attributes:
        heartbeat: seconds since its last sign of life, by this machine's clock.
    """

    host: str
    pid: int
    heartbeat: float


@contextlib.contextmanager
def leased(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a directory while the block runs, after waiting for any other holder.

    Yields:
        A function to call before writing; raises LeaseLost if the directory has been taken over.
    """
    with atomic.translate_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lease = _lease(folder)
        lease.acquire(poll_interval=0.25)

    def check() -> None:
        if lease.compromise is not None:
            raise LeaseLost(f"another process took over {folder}: {lease.compromise.reason}")

    try:
        yield check
    finally:
        lease.release()


def holder_of(folder: Path) -> Holder | None:
    """Return the process that works in a directory; None if there is none or it is known to be dead."""
    owner = _lease(folder).owner
    try:
        heartbeat = max(0.0, time.time() - (folder / ".lease").stat().st_mtime)
    except OSError:
        return None
    if owner is None or heartbeat > DURATION:
        return None
    host = owner.hostname.partition("?")[0]  # the rest names the container
    if host == socket.gethostname() and not atomic.is_alive(owner.pid):
        return None
    return Holder(host, owner.pid, heartbeat)


def _lease(folder: Path) -> SoftFileLease:
    from filelock import SoftFileLease

    return SoftFileLease(folder / ".lease", lease_duration=DURATION, heartbeat_interval=HEARTBEAT)
