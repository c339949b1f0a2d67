"""Files and folders that appear complete or not at all: a hidden temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from emomerge import watch
from emomerge.errors import BadInput
from emomerge.files import to_json
from emomerge.numerics.hashing import sha256 as sha256

_SERIAL = itertools.count()
_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another path"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another path"),
    errno.EFBIG: ("the file system does not support files this large", "choose a smaller --max-shard-size"),
    errno.EACCES: ("no permission to write", "choose another path"),
    errno.EPERM: ("no permission to write", "choose another path"),
    errno.EROFS: ("the file system is read-only", "choose another path"),
    errno.ENAMETOOLONG: ("the file name is too long", "choose a shorter one"),
    errno.EEXIST: ("a parent of the path is a file", "choose another path"),
    errno.ENOTDIR: ("a parent of the path is a file", "choose another path"),
}


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file so that readers see the old text or the new text, never a part of it."""
    with translate_os_error(path), new_path(Path(path), force=True) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as indented JSON; see `write_text`."""
    write_text(path, to_json(obj, ascii_only=False) + "\n")


@contextlib.contextmanager
def new_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `out` if the block succeeds and is removed if it fails.

    Raises:
        BadInput: `out` exists and `force` is not given, or the disk cannot take it.
    """
    with translate_os_error(out), new_path(Path(out), force=force) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def new_path(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield the name of a temporary sibling of `out`, for a file or folder that the caller creates; see `new_folder`."""
    _remove_leftovers(out)
    refuse_existing(out, force=force)
    refuse_no_disk(out)
    watch.refuse_inputs_below(out)
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    temporary = out.with_name(f".{out.name}.{socket.gethostname()}-{os.getpid()}-{next(_SERIAL)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync_tree(temporary)
        watch.require_unchanged()
        refuse_existing(out, force=force)
        replace(temporary, out)
    except BaseException:
        _remove(temporary)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise BadInput if `out` exists and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise BadInput("the output already exists", where=out, fix="choose another path or give --force")
    if out.is_dir() and any(folder.resolve().is_relative_to(out.resolve()) for folder in (Path.cwd(), Path.home())):
        raise BadInput("refusing to replace the working directory or the home directory", where=out, fix="choose another path")


def replace(src: Path, dst: Path) -> None:
    """Rename `src` to `dst`, replacing what is there. All renames of the package go through this function."""
    if dst.is_dir() and not dst.is_symlink():  # the system replaces files in one step, but not folders that have contents
        old = src.with_suffix(".old")
        if _exchange(src, dst):
            src.rename(old)
        else:
            dst.rename(old)
            try:
                src.rename(dst)
            except BaseException:
                old.rename(dst)
                raise
        _sync(dst.parent)
        _remove(old)
    else:
        src.replace(dst)
        _sync(dst.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that there is no moment with neither; False if the system cannot."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange is not None and exchange(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


@contextlib.contextmanager
def translate_os_error(where: str | Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's errors about a full disk, quotas and permissions into BadInput.

    Args:
        where: the output that the message names.
        needed: size of the whole output in bytes, if known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in _ERRORS:
            raise
        what, fix = _ERRORS[number]
        full = number in (errno.ENOSPC, errno.EDQUOT)
        free = free_space(Path(where)) if number == errno.ENOSPC else None
        short = free is not None and (needed is None or free < needed)  # not if removing the temporaries made room
        raise BadInput(
            what,
            where=where,
            expected=f"{size(needed)} of space" if full and needed else None,
            found=f"{size(free)} free" if free is not None and short else None,
            fix=fix,
        ) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """Return the system's error number; safetensors only mentions it in its message."""
    if isinstance(error, OSError):
        return error.errno
    written = re.search(r"os error (\d+)", str(error))
    return int(written[1]) if written else None


def require_space(out: Path, needed: int) -> None:
    """Raise BadInput if the disk of `out` has fewer than `needed` bytes free."""
    refuse_no_disk(out)
    free = free_space(out)
    if free < needed:
        what, fix = _ERRORS[errno.ENOSPC]
        raise BadInput(what, where=out, expected=f"{size(needed)} of space", found=f"{size(free)} free", fix=fix)


def refuse_no_disk(path: Path) -> None:
    """Raise BadInput if a path is on a file system that shows the kernel's state, such as /proc, and stores nothing."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if shutil.disk_usage(existing).total == 0:
        raise BadInput("not a disk: no file can be stored here", where=path, fix="choose another path")


def free_space(path: Path) -> int:
    """Return the free bytes of the disk that `path` is on or would be created on."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def size(nbytes: int) -> str:
    """Format a number of bytes for people: 1.5 GB."""
    value, units = float(nbytes), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"


def _remove_leftovers(out: Path) -> None:
    """Remove temporaries of `out` that killed processes of this machine left; restore an `out` that they had moved aside."""
    if not out.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{out.name}.{socket.gethostname()}-") + r"(\d+)-\d+\.(tmp|old)")
    for leftover in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(leftover.name)
        if match is None or is_alive(int(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(out):
            leftover.rename(out)
        else:
            _remove(leftover)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_tree(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
