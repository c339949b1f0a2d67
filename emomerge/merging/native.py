"""The fast path on the CPU: methods that treat every element alike, from kernels.c, with what the diagnostics sum up."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from emomerge import native
from emomerge.checkpoints import Checkpoint
from emomerge.errors import BadInput
from emomerge.merging.thresholds import Cut, rank_of

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

KERNELS = Path(__file__).with_name("kernels.c")
PIECE = 2**17
"""Elements whose sums go on in one double, and the least that is worth a thread (kernels.c)."""
DIGIT = 2**16
MOST_RUNS = 64

KINDS = {torch.float32: 0, torch.bfloat16: 1}
DELTA, STILL = 2, 3
METHODS = {"linear": 0, "tall-mask": 1, "ties": 2}
ELECT = {"sum": 0, "weighted": 1, "count": 2}
AGGREGATE = {"mean": 0, "count": 1, "sum": 2, "max": 3}


class Part(NamedTuple):
    """A range of elements, which one thread works on."""

    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """One tensor of the base and of the runs as it is stored, float32 or bfloat16; or a task vector that is known exactly."""

    base: Tensor
    runs: tuple[Tensor | None, ...]
    kinds: tuple[int, ...]
    labels: tuple[str, ...]
    name: str

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.base.numel()

    def merge(
        self,
        method: str,
        weights: Tensor,
        *,
        numbers: Tensor | None = None,
        last: Tensor | None = None,
        options: Sequence[int] = (),
        figures: Figures,
    ) -> Tensor:
        """τ_m, float32, of the tensor's shape; the figures are added up.

        Args:
            method: a key of `METHODS`.
            weights: (runs,).
            numbers: (runs,): λ of tall-mask, thresholds of ties.
            last: (runs,): of the elements equal to a threshold the last place that counts (ties).
            options: see kernels.c.
            figures: where the sums go.
        """
        merged = torch.empty(self.base.shape, dtype=torch.float32)
        found = self._run(method, weights, numbers, last, options, merged)
        for products, counts in found:
            figures.add_sums(products, counts)
        return merged

    def balance(self, weights: Tensor, *, numbers: Tensor, last: Tensor | None, elect: int) -> int:
        """Coordinates that elect plus, less those that elect minus (ties)."""
        runs = len(self.runs)
        found = self._run("ties", weights, numbers, last, (elect, 0, 0), None)
        return sum(int(counts[runs + 2 * runs * runs]) for _, counts in found)

    def largest(self, counts: Sequence[int]) -> Cut:
        """Exactly so many elements of each run; of equal ones the first."""
        thresholds, places = torch.zeros(len(self.runs)), torch.full((len(self.runs),), self.numel)

        def work(run: int) -> None:
            thresholds[run], places[run] = self._largest(run, counts[run])

        native.in_parallel(work, range(len(self.runs)))
        return Cut(thresholds.unsqueeze(1), None if (places == self.numel).all() else places.unsqueeze(1))

    def _largest(self, run: int, count: int) -> tuple[float, int]:
        n = self.numel
        if count >= n or count <= 0:
            return 0.0 if count > 0 else torch.inf, n
        high = self.count_digits(run, 16, -1)
        digit, rank = rank_of(high, n - count + 1)
        low = self.count_digits(run, 0, digit)
        rest, within = rank_of(low, rank)
        value = float(torch.tensor((digit << 16) | rest, dtype=torch.int32).view(torch.float32))
        equal = int(low[rest])
        wanted = equal - within + 1  # of those that equal the threshold
        return value, n if wanted == equal else self._place(run, value, wanted)

    def count_all(self, shift: int, prefixes: Sequence[int]) -> Tensor:
        """`count_digits` of every run, (runs, 65536)."""
        counts = torch.zeros(len(self.runs), DIGIT, dtype=torch.int64)

        def work(run: int) -> None:
            counts[run] = self.count_digits(run, shift, prefixes[run])

        native.in_parallel(work, range(len(self.runs)))
        return counts

    def count_digits(self, run: int, shift: int, prefix: int) -> Tensor:
        """How often each value of 16 bits of the magnitudes' patterns occurs, (65536,), int64."""
        counts = torch.zeros(DIGIT, dtype=torch.int64)
        arguments = [*self._data(run), ctypes.c_int(shift), ctypes.c_int64(prefix), ctypes.c_void_p(counts.data_ptr())]
        self._check(_kernels().count_digits(ctypes.c_long(0), ctypes.c_long(self.numel), *arguments), run)
        return counts

    def _place(self, run: int, value: float, nth: int) -> int:
        function = _kernels().place_of_equal
        function.restype = ctypes.c_int64
        arguments = [*self._data(run), ctypes.c_float(value), ctypes.c_int64(nth)]
        return int(function(ctypes.c_long(self.numel), *arguments))

    def _data(self, run: int) -> list[Any]:
        tensor = self.runs[run]
        address = None if tensor is None else tensor.data_ptr()
        base = [ctypes.c_void_p(self.base.data_ptr()), ctypes.c_int(KINDS[self.base.dtype])]
        return [*base, ctypes.c_void_p(address), ctypes.c_int(self.kinds[run])]

    def _run(
        self,
        method: str,
        weights: Tensor,
        numbers: Tensor | None,
        last: Tensor | None,
        options: Sequence[int],
        merged: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Products (pieces, pairs) and counts of every part."""
        runs = len(self.runs)
        numbers = (torch.zeros(runs) if numbers is None else numbers).float().contiguous()
        last = (torch.full((runs,), self.numel) if last is None else last).contiguous()
        weights = weights.float().contiguous()
        thetas = (ctypes.c_void_p * runs)(*(None if t is None else t.data_ptr() for t in self.runs))
        kinds, choices = (ctypes.c_int * runs)(*self.kinds), (ctypes.c_int * 3)(*options)
        parts = _parts(self.numel, native.threads() if merged is not None else 1)
        results = [
            (
                torch.zeros(-(-(part.stop - part.start) // PIECE), runs * (runs + 1) // 2 + 4, dtype=torch.float64),
                torch.zeros(runs + 2 * runs * runs + 2, dtype=torch.int64),
            )
            for part in parts
        ]

        def work(index: int) -> None:
            products, counts = results[index]
            pointers = [None if t is None else t.data_ptr() for t in (weights, numbers, last)]
            outputs = [None if t is None else t.data_ptr() for t in (merged, products, counts)]
            status = _kernels().merge(
                ctypes.c_int(METHODS[method]), ctypes.c_long(parts[index].start), ctypes.c_long(parts[index].stop),
                ctypes.c_int(runs), ctypes.c_void_p(self.base.data_ptr()), ctypes.c_int(KINDS[self.base.dtype]), thetas, kinds,
                *map(ctypes.c_void_p, pointers), choices, *map(ctypes.c_void_p, outputs),
            )  # fmt: skip
            self._check(status, status - 2)

        native.in_parallel(work, range(len(parts)))
        return results

    def _check(self, status: int, run: int) -> None:
        if status == 1:
            raise MemoryError(f"no memory to merge {self.name}")
        if status:
            where = f"{self.name} of run {self.labels[run]}"
            raise BadInput("non-finite task vector", where=where, fix="leave this run out")


def open_source(name: str, base: Checkpoint, runs: Sequence[Checkpoint], labels: Sequence[str]) -> Source | None:
    """One tensor as it is stored; None where the kernels cannot work on it, or no run moves it."""
    if len(runs) > MOST_RUNS or base.info(name).dtype not in KINDS or native.library(KERNELS) is None:
        return None
    plain = [type(run).delta is Checkpoint.delta for run in runs]
    if any(dense and run.info(name).dtype not in KINDS for run, dense in zip(runs, plain, strict=True)):
        return None
    origin = base[name]
    tensors = [run[name] if dense else run.delta(name, base) for run, dense in zip(runs, plain, strict=True)]
    if not origin.numel() or all(t is None for t in tensors):
        return None
    if not origin.is_cpu or any(t is not None and (not t.is_cpu or t.dtype not in KINDS) for t in tensors):
        return None
    kinds = [STILL if t is None else KINDS[t.dtype] if dense else DELTA for t, dense in zip(tensors, plain, strict=True)]
    if any(kind == DELTA and t is not None and t.dtype != torch.float32 for kind, t in zip(kinds, tensors, strict=True)):
        return None
    flat = tuple(None if t is None else t.contiguous() for t in tensors)
    return Source(origin.contiguous(), flat, tuple(kinds), tuple(labels), name)


def _parts(numel: int, threads: int) -> list[Part]:
    """About equal ranges that begin at whole pieces."""
    pieces = -(-numel // PIECE)
    threads = min(threads, pieces)
    cuts = [min(pieces * index // threads * PIECE, numel) for index in range(threads + 1)]
    return [Part(*ends) for ends in pairwise(cuts)]


def _kernels() -> ctypes.CDLL:
    compiled = native.library(KERNELS)
    assert compiled is not None, "ask `open_source` first"
    return compiled
