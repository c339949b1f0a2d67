"""Inputs that must stay as they are while a command reads them and writes its output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from emomerge.errors import BadInput

Identity = tuple[int, int, int, int]
"""Device, inode, size and modification time of a file, which show whether it was replaced or changed."""
_INPUTS: ContextVar[dict[Path, Identity] | None] = ContextVar("inputs", default=None)


def identity_of(status: os.stat_result) -> Identity:
    """Return what distinguishes a file from one that replaced it, or from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def watched_inputs() -> Iterator[None]:
    """Within the block, no output replaces an input, and none appears if an input was changed in the meantime."""
    token = _INPUTS.set({})
    try:
        yield
    finally:
        _INPUTS.reset(token)


def note(path: Path, identity: Identity) -> None:
    """Note an input, if inputs are being watched. Raises BadInput if it was noted before with another identity."""
    inputs = _INPUTS.get()
    if inputs is not None and inputs.setdefault(path.absolute(), identity) != identity:
        raise changed(path)


def refuse_inputs_below(out: Path) -> None:
    """Raise BadInput if `out` is a watched input or a folder that holds one."""
    place = out.resolve()
    for path in _INPUTS.get() or ():
        if path.resolve().is_relative_to(place):
            raise BadInput("refusing to replace an input", where=out, found=path, fix="choose another path")


def require_unchanged() -> None:
    """Raise BadInput if a watched input was replaced, changed or removed since it was noted."""
    for path, identity in (_INPUTS.get() or {}).items():
        try:
            status = path.stat()
        except OSError as error:
            raise changed(path, error.strerror) from None
        require_same(path, identity, status)


def require_same(path: Path, identity: Identity, status: os.stat_result) -> None:
    """Raise BadInput if a file is not the one of that identity any more."""
    if identity_of(status) != identity:
        raise changed(path)


def changed(path: Path, found: str | None = None) -> BadInput:
    """Return the error for an input that was changed while it was in use."""
    return BadInput("an input was changed while it was read", where=path, found=found, fix="run the command again")
