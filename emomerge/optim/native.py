"""The fast path on the CPU: kernels.c, compiled once on this machine by its C compiler.

torch has no kernel for these rules, and one operation after another reads every tensor from memory several times. Without a
C compiler, or with EMOMERGE_NATIVE=0 in the environment, the optimizers use torch's own operations: the same results up to
rounding, at two to three times the time.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # 8 % faster where there is AVX-512, without effect elsewhere
SHARE = 2**19
"""Elements that are worth another thread."""

PLAIN = (Tensor, torch.nn.Parameter)
REALS = {torch.float32: "float", torch.float64: "double"}


def fits(*tensors: Tensor) -> bool:
    """Whether compiled kernels can work on these tensors: dense, all float32 or all float64, in the memory of the host."""
    if torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    for t in tensors:
        if type(t) not in PLAIN or not t.is_cpu or t.dtype != dtype or not t.is_contiguous():
            return False
    return dtype in REALS and _library(REALS[dtype]) is not None


def run(kernel: str, sizes: Sequence[Sequence[int]], tensors: Sequence[Sequence[Tensor]], scalars: Sequence[float]) -> None:
    """Run a kernel of kernels.c over a list of tensors, on as many threads as torch uses.

    Args:
        kernel: its name.
        sizes: for each of the kernel's size arguments one number a tensor; their product is the number of elements.
        tensors: for each of the kernel's tensor arguments one tensor for each parameter.
        scalars: the kernel's last arguments.
    """
    library = _library(REALS[tensors[0][0].dtype])
    assert library is not None, "ask `fits` first"
    function = getattr(library, kernel)
    last = [ctypes.c_double(value) for value in scalars]

    def work(part: slice) -> None:
        longs = [(ctypes.c_long * len(column[part]))(*column[part]) for column in sizes]
        pointers = [(ctypes.c_void_p * len(column[part]))(*(t.data_ptr() for t in column[part])) for column in tensors]
        if function(ctypes.c_long(len(longs[0])), *longs, *pointers, *last):
            raise MemoryError(f"no memory for the sums of {kernel}")

    parts = _shares([t.numel() for t in tensors[0]], torch.get_num_threads())
    others = [_threads().submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()


def _shares(numels: Sequence[int], threads: int) -> list[slice]:
    """Consecutive tensors for each thread, about equally many elements each; one share where threads would not pay."""
    total = sum(numels)
    threads = max(min(threads, total // SHARE), 1)
    if threads == 1:
        return [slice(0, len(numels))]
    starts, done = [0], 0
    for index, numel in enumerate(numels):
        if index > starts[-1] and len(starts) < threads and done + numel / 2 >= total * len(starts) / threads:
            starts.append(index)
        done += numel
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(numels)], strict=True)]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="emomerge-optim")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


@cache
def _library(real: str) -> ctypes.CDLL | None:
    """The compiled kernels, from the cache if they are there; None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("EMOMERGE_NATIVE") == "0":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        source = Path(__file__).with_name("kernels.c")
        key = "\n".join([compiler, *FLAGS, real, _processor(), source.read_text()])
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "emomerge"
        target = folder / f"kernels-{real}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                command = [compiler, *FLAGS, f"-DREAL={real}", str(source), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                built.replace(target)
        return ctypes.CDLL(str(target))
    return None


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves several machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"
