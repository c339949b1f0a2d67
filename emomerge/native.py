"""Compile each kernels.c once per machine with the system's C compiler, similar to torch.compile and Triton.

torch has no kernels for these formulas, and a sequence of its operations reads every tensor from memory several times. Without
a C compiler, or with EMOMERGE_NATIVE=0 in the environment, callers use torch's own operations, which are slower but give the
same results up to rounding. `status` reports which path is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

FLAGS = [
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # 8 % faster with AVX-512, no effect elsewhere
PLAIN_FLAGS = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]
"""For compilers that reject some of FLAGS, such as -march=native on ARM."""

Item = TypeVar("Item")


class Build(NamedTuple):
    """A compiled library, or None with the reason why torch's own operations are used instead."""

    library: ctypes.CDLL | None
    compiler: str = ""
    reason: str = ""


def library(source: Path, *defines: str) -> ctypes.CDLL | None:
    """Return the library compiled from a source, or None if unavailable; compiles on first use and caches on disk.

    Args:
        source: a C file.
        defines: preprocessor definitions, such as `REAL=float`.
    """
    return build(source, *defines).library


def status(source: Path, *defines: str) -> str:
    """Return which path is in use for a source: the compiler that built it, or torch with the reason; builds it if needed."""
    found = build(source, *defines)
    if found.library is None:
        return f"torch ({found.reason})"
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        answer = subprocess.run([found.compiler, "--version"], capture_output=True, text=True, timeout=10)
        return f"compiled by {found.compiler} ({answer.stdout.splitlines()[0]})"
    return f"compiled by {found.compiler}"


@cache
def build(source: Path, *defines: str) -> Build:
    """Compile a source, or load it from the cache; see `library`. Warns once if the compiler fails."""
    name, *arguments = os.environ.get("CC", "").split() or ["cc"]  # CC may be `ccache gcc`
    compiler = shutil.which(name)
    if os.environ.get("EMOMERGE_NATIVE") == "0":
        return Build(None, reason="EMOMERGE_NATIVE=0")
    if compiler is None:
        return Build(None, reason=f"no C compiler: {name} not found")
    try:
        command = [compiler, *arguments, *(f"-D{define}" for define in defines)]
        return Build(_load_or_compile(command, source), compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = (
            f"{compiler} failed on {source}: {' '.join((said.decode(errors='replace').strip() or str(error)).split())[:200]}"
        )
        warnings.warn(
            f"{reason}; torch's own operations are used, which are slower (EMOMERGE_NATIVE=0 silences this)", stacklevel=3
        )
        return Build(None, reason=reason)


def _load_or_compile(command: list[str], source: Path) -> ctypes.CDLL:
    key = "\n".join([*command, *FLAGS, _processor(), _text_of(source)])
    file = f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if folder and is_private(folder / file):
        with contextlib.suppress(OSError):  # damaged, or from another system that shares the disk: compile again
            return ctypes.CDLL(str(folder / file))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a new folder of this user alone
        built = Path(scratch) / file
        _compile(command, source, built)
        built.chmod(0o700)
        return ctypes.CDLL(str(built.replace(folder / file) if folder else built))


def _text_of(source: Path) -> str:
    """Return a source with the headers of the package that it includes."""
    text = source.read_text()
    headers = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return "\n".join([text, *(_text_of(source.parent / header) for header in headers)])


def _compile(command: list[str], source: Path, built: Path) -> None:
    last = [str(source), "-o", str(built), "-lm"]
    try:
        subprocess.run([*command, *FLAGS, *last], check=True, capture_output=True, timeout=60)
    except subprocess.CalledProcessError:
        subprocess.run([*command, *PLAIN_FLAGS, *last], check=True, capture_output=True, timeout=60)


def cache_folder() -> Path | None:
    """Return the folder for compiled code and other things made once.

    None for a user without a home directory, on a read-only disk, or if others may write in it: they could put code of their
    own there.
    """
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emomerge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if os.access(folder, os.W_OK) and is_private(folder) else None
    return None


def is_private(path: Path) -> bool:
    """Return whether `path` exists, is no link, belongs to this user and can be written by nobody else."""
    try:
        status = path.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows, where a user's cache is private
        return not stat.S_ISLNK(status.st_mode)
    is_own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_own and (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode))


def in_parallel(work: Callable[[Item], object], parts: Sequence[Item]) -> None:
    """Run `work` on all parts concurrently, the first on this thread. Compiled code releases the interpreter lock."""
    others = [_threads().submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()


def ranges(numel: int, piece: int) -> list[tuple[int, int]]:
    """Split elements into a range for each thread, of about equal size, that begins at a multiple of `piece`."""
    pieces = -(-numel // piece)
    count = max(min(threads(), pieces), 1)
    cuts = [min(pieces * index // count * piece, numel) for index in range(count + 1)]
    return [*pairwise(cuts)]


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return a C array of the tensors' addresses; the caller must keep the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


def longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    """Return a C array of long."""
    return (ctypes.c_long * len(numbers))(*numbers)


def threads() -> int:
    """Return the number of threads that torch uses."""
    return torch.get_num_threads()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="emomerge")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def _processor() -> str:
    """Return a description of the processor for -march=native: a cache on a shared disk may serve several machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"
