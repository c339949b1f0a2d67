"""Compiling a room's kernels.c once on this machine, with its C compiler, as torch.compile and Triton do with theirs.

torch has no kernel for these formulas, and one operation after another reads every tensor from memory several times. Without
a C compiler, or with EMOMERGE_NATIVE=0 in the environment, every caller has a path through torch's own operations: slower,
with the same results up to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

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
    FLAGS.append("-mprefer-vector-width=512")  # 8 % faster where there is AVX-512, without effect elsewhere
PLAIN_FLAGS = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]
"""For compilers that do not know the others, as some do not know -march=native on ARM."""

Item = TypeVar("Item")


@cache
def library(source: Path, *defines: str) -> ctypes.CDLL | None:
    """The compiled source, from the cache if it is there; None where it cannot be had.

    Args:
        source: a file of C.
        defines: what the preprocessor is to know, such as `REAL=float`.
    """
    name, *arguments = os.environ.get("CC", "").split() or ["cc"]  # CC may be `ccache gcc`
    compiler = shutil.which(name)
    if compiler is None or os.environ.get("EMOMERGE_NATIVE") == "0":
        return None
    command = [compiler, *arguments, *(f"-D{define}" for define in defines)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        key = "\n".join([*command, *FLAGS, _processor(), source.read_text()])
        file = f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        folder = _cache_folder()
        if folder and (folder / file).exists():
            with contextlib.suppress(OSError):  # damaged, or of another system that shares the disk: made anew
                return ctypes.CDLL(str(folder / file))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / file
            _compile(command, source, built)
            return ctypes.CDLL(str(built.replace(folder / file) if folder else built))
    return None


def _compile(command: list[str], source: Path, built: Path) -> None:
    last = [str(source), "-o", str(built), "-lm"]
    try:
        subprocess.run([*command, *FLAGS, *last], check=True, capture_output=True, timeout=60)
    except subprocess.CalledProcessError:
        subprocess.run([*command, *PLAIN_FLAGS, *last], check=True, capture_output=True, timeout=60)


def _cache_folder() -> Path | None:
    """Where compiled code is kept; None for a user without a home, or on a disk that is read only."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emomerge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if os.access(folder, os.W_OK) else None
    return None


def in_parallel(work: Callable[[Item], object], parts: Sequence[Item]) -> None:
    """Do the parts at the same time, the first on this thread. Compiled code lets the others run."""
    others = [_threads().submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of the tensors' addresses; the caller keeps the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    """A C array of long."""
    return (ctypes.c_long * len(numbers))(*numbers)


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="emomerge")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves several machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"
