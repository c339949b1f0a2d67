"""Files and folders that appear complete or not at all: a hidden temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from emomerge.errors import BadInput
from emomerge.numerics.hashing import sha256 as sha256

_SERIAL = itertools.count()
_TROUBLE = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another place"),
    errno.EFBIG: ("the file system takes no file this large", "choose a smaller --max-shard-size"),
    errno.EACCES: ("no permission to write", "choose another place"),
    errno.EPERM: ("no permission to write", "choose another place"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.ENAMETOOLONG: ("the file name is too long", "choose a shorter one"),
    errno.EEXIST: ("a part of the path is a file", "choose another place"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another place"),
}


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file so that readers see the old text or the new one, never a part."""
    with translate_os_error(path), new_path(Path(path), force=True) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: Any) -> None:
    """`write_text` of an object as indented JSON."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        BadInput: `out` exists and `force` is not given, or the disk cannot take it.
    """
    with translate_os_error(out), new_path(Path(out), force=force) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def new_path(out: Path, *, force: bool) -> Iterator[Path]:
    """The name of a temporary sibling of `out`, for a file or a folder that the caller makes; see `new_folder`."""
    _clean_up_after_the_killed(out)
    refuse_existing(out, force=force)
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    temporary = out.with_name(f".{out.name}.{socket.gethostname()}-{os.getpid()}-{next(_SERIAL)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync_tree(temporary)
        refuse_existing(out, force=force)
        replace(temporary, out)
    except BaseException:
        _remove(temporary)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise BadInput where `out` exists and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise BadInput("the output exists already", where=out, fix="choose another place or give --force")
    if out.is_dir() and any(place.resolve().is_relative_to(out.resolve()) for place in (Path.cwd(), Path.home())):
        raise BadInput("refusing to replace a folder that one works in", where=out, fix="choose another place")


def replace(src: Path, dst: Path) -> None:
    """Rename `src` to `dst`, taking the place of what is there. Every rename of the product happens here."""
    if dst.is_dir() and not dst.is_symlink():  # the system replaces files in one step, but no folder that has contents
        old = src.with_suffix(".old")
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


@contextlib.contextmanager
def translate_os_error(where: str | Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn what the operating system says of a full disk, of quotas and of permissions into BadInput.

    Args:
        where: the output that the message names.
        needed: bytes that the whole output takes, if known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in _TROUBLE:
            raise
        what, fix = _TROUBLE[number]
        full = number in (errno.ENOSPC, errno.EDQUOT)
        raise BadInput(
            what,
            where=where,
            expected=f"{size(needed)} of space" if full and needed else None,
            found=f"{size(free_space(Path(where)))} free" if full else None,
            fix=fix,
        ) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors only writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    written = re.search(r"os error (\d+)", str(error))
    return int(written[1]) if written else None


def require_space(out: Path, needed: int) -> None:
    """Raise BadInput where the disk that `out` goes to has fewer than `needed` bytes free."""
    free = free_space(out)
    if free < needed:
        what, fix = _TROUBLE[errno.ENOSPC]
        raise BadInput(what, where=out, expected=f"{size(needed)} of space", found=f"{size(free)} free", fix=fix)


def free_space(path: Path) -> int:
    """Free bytes of the disk that `path` is on or would be made on."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def size(nbytes: int) -> str:
    """A number of bytes for people: 1.5 GB."""
    value, units = float(nbytes), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"


def _clean_up_after_the_killed(out: Path) -> None:
    """Remove temporaries that killed processes of this machine left of `out`; put back an `out` they had set aside."""
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
    """Whether a process of this machine is there."""
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
    """Bring a file, or a folder with all it holds, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
