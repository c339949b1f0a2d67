"""Inputs that must stay as they are while a command reads them and writes its output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from emomerge.errors import BadInput, EmomergeError

Identity = tuple[int, int, int, int]
"""Device, inode, size and modification time of a file, which show whether it was replaced or changed."""


class _Watched(NamedTuple):
    """What a block watches."""

    inputs: dict[Path, Identity]
    held: contextlib.ExitStack
    """What lasts as long as the block."""
    names: set[str]
    """The functions that gave it."""


_WATCHED: ContextVar[_Watched | None] = ContextVar("watched", default=None)


def identity_of(status: os.stat_result) -> Identity:
    """Return what distinguishes a file from one that replaced it, or from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def watched_inputs() -> Iterator[None]:
    """Within the block, no output replaces an input, and none appears if an input was changed in the meantime.

    Raises:
        BadInput: an input was changed; also in place of any other error that this may have caused.
    """
    with contextlib.ExitStack() as held:
        token = _WATCHED.set(_Watched({}, held, set()))
        held.callback(_WATCHED.reset, token)
        try:
            yield
        except EmomergeError:
            raise
        except Exception:
            require_unchanged()
            raise


def is_watching() -> bool:
    """Return whether inputs are being watched."""
    return _WATCHED.get() is not None


def hold(context: Callable[[], contextlib.AbstractContextManager[None]]) -> bool:
    """Enter a context that lasts as long as the watching block, unless it was entered before; return True."""
    watched = _WATCHED.get()
    assert watched is not None
    if context.__qualname__ not in watched.names:
        watched.names.add(context.__qualname__)
        watched.held.enter_context(context())
    return True


def _inputs() -> dict[Path, Identity]:
    watched = _WATCHED.get()
    return {} if watched is None else watched.inputs


def note(path: Path, identity: Identity) -> None:
    """Note an input, if inputs are being watched. Raises BadInput if it was noted before with another identity."""
    if is_watching() and _inputs().setdefault(path.absolute(), identity) != identity:
        raise changed(path)


def refuse_inputs_below(out: Path) -> None:
    """Raise BadInput if `out` is a watched input or a folder that holds one."""
    place = out.resolve()
    for path in _inputs():
        if path.resolve().is_relative_to(place):
            raise BadInput("refusing to replace an input", where=out, found=path, fix="choose another path")


def require_unchanged() -> None:
    """Raise BadInput if a watched input was replaced, changed or removed since it was noted."""
    for path, identity in _inputs().items():
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
