"""Compiled CPU kernels for elementwise methods (kernels.c), which also accumulate the sums for the diagnostics."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emomerge import native
from emomerge.checkpoints import Checkpoint
from emomerge.checkpoints.factors import PIECE, Prepared
from emomerge.errors import BadInput
from emomerge.merging.thresholds import Bracket, Cut, sample_step

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

KERNELS = Path(__file__).with_name("kernels.c")
MOST_RUNS = 64

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DELTA, STILL, FACTORS = 3, 4, 5
METHODS = {"linear": 0, "tall-mask": 1, "ties": 2, "balance": 3}
ELECT = {"sum": 0, "weighted": 1, "count": 2}
AGGREGATE = {"mean": 0, "count": 1, "sum": 2, "max": 3}


@dataclass
class RoundedOutput:
    """θ₀ + scale·τ_m in the dtype of a file, and the loss from rounding to it."""

    dtype: torch.dtype
    scale: float
    out: Tensor | None = None
    """Contiguous memory for it, if there is some."""
    finite: bool = True
    stepped: int = 0
    """Number of elements that the merge moves."""
    unchanged: int = 0
    """Number of these that round to the base's value."""
    squared_errors: list[float] = field(default_factory=list)
    squared_lengths: list[float] = field(default_factory=list)
    """For each part of the tensor, the squared norms of the rounding error of scale·τ_m and of scale·τ_m itself."""


class _Job(ctypes.Structure):
    """`struct job` of kernels.c."""

    _fields_ = [
        ("method", ctypes.c_int),
        ("runs", ctypes.c_int),
        ("base_kind", ctypes.c_int),
        ("out_kind", ctypes.c_int),
        ("base", ctypes.c_void_p),
        ("theta", ctypes.c_void_p),
        ("kinds", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("merged", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("options", ctypes.c_int * 3),
    ]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the base and of the runs in its stored dtype of 32 or 16 bits, or a run's exact task vector instead: whole,
    or as factors.

    If `written` is given, `merge` returns the rounded output instead of τ_m.
    """

    base: Tensor
    runs: tuple[Tensor | Prepared | None, ...]
    kinds: tuple[int, ...]
    labels: tuple[str, ...]
    name: str
    written: RoundedOutput | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.base.numel()

    @property
    def moves(self) -> bool:
        """Whether any run may move it."""
        return any(run is not None for run in self.runs)

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
        """Return τ_m in float32, or the rounded output, in the tensor's shape, and add to the figures.

        Args:
            method: a key of `METHODS`.
            weights: (runs,).
            numbers: (runs,), λ or thresholds, as the kernel requires.
            last: (runs,), the last index of an element equal to the threshold that is kept.
            options: see kernels.c.
            figures: receives the sums.
        """
        merged = self.written.out if self.written else None
        if merged is None:
            merged = torch.empty(self.base.shape, dtype=self.written.dtype if self.written else torch.float32)
        for sums, counts in self._run(method, weights, numbers, last, options, merged):
            figures.add_sums(sums[:, :-2], counts[:-2])
            if self.written:
                self.written.squared_errors += sums[:, -2].tolist()
                self.written.squared_lengths += sums[:, -1].tolist()
                self.written.stepped += int(counts[-2])
                self.written.unchanged += int(counts[-1])
        return merged

    def balance(self, weights: Tensor, *, numbers: Tensor, last: Tensor | None, elect: int) -> int:
        """Return the number of elements that elect plus minus the number of elements that elect minus (TIES)."""
        return sum(int(counts[-4]) for _, counts in self._run("balance", weights, numbers, last, (elect,), None))

    def largest(self, counts: Sequence[int]) -> Cut | None:
        """Select the `counts` largest elements of each run, the first ones in case of ties; None if a sample was misleading."""
        found: list[tuple[float, int] | None] = [None] * len(self.runs)

        def work(run: int) -> None:
            found[run] = self._largest(run, counts[run])

        native.in_parallel(work, range(len(self.runs)))
        some = [each for each in found if each is not None]
        if len(some) < len(found):
            return None
        thresholds, places = torch.tensor(some, dtype=torch.float64).T
        return Cut(thresholds.float().unsqueeze(1), None if (places == self.numel).all() else places.long().unsqueeze(1))

    def _largest(self, run: int, count: int) -> tuple[float, int] | None:
        n = self.numel
        if count >= n or count <= 0:
            return 0.0 if count > 0 else torch.inf, n
        bracket = Bracket.of(self.sample(run, sample_step(n)), n - count + 1, n)
        counts = self.collect(run, bracket)
        rank = bracket.find(n - count + 1)
        if rank is None:
            return None
        wanted = rank.equal - rank.within + 1  # of the elements equal to the threshold
        if wanted == rank.equal:
            return rank.value, n
        up_to = bracket.equal(rank.value, counts).cumsum()
        piece = int(np.searchsorted(up_to, wanted))
        before = int(up_to[piece - 1]) if piece else 0
        return rank.value, self._place(run, rank.value, wanted - before, piece * PIECE)

    def sample(self, run: int, step: int) -> NDArray[np.int32]:
        """Return the magnitude of every step-th element of a run, as bit patterns."""
        patterns = np.empty(-(-self.numel // step), np.int32)
        job, _keep = self._job("linear", (), None)
        arguments = ctypes.c_int(run), ctypes.c_long(self.numel), ctypes.c_long(step), ctypes.c_void_p(patterns.ctypes.data)
        _kernels().sample(ctypes.byref(job), *arguments)
        return patterns

    def collect(self, run: int, bracket: Bracket) -> NDArray[np.int64]:
        """Add the magnitudes of one run to a bracket; return the counts of each piece (see `Bracket.add`)."""
        counts, inside = np.zeros((-(-self.numel // PIECE), 4), np.int64), np.empty(min(bracket.room, self.numel), np.int32)
        job, _keep = self._job("linear", (), None)
        arguments = ctypes.c_int32(bracket.low), ctypes.c_int32(bracket.high), ctypes.c_int64(len(inside))
        outputs = (ctypes.c_void_p(array.ctypes.data) for array in (counts, inside))
        size = ctypes.c_long(self.numel)
        self._check(_kernels().collect(ctypes.byref(job), ctypes.c_int(run), size, *arguments, *outputs))
        bracket.add(counts.sum(axis=0).tolist(), inside)
        return counts

    def _place(self, run: int, value: float, nth: int, start: int) -> int:
        function = _kernels().place_of_equal
        function.restype = ctypes.c_int64
        job, _keep = self._job("linear", (), None)
        places = ctypes.c_long(start), ctypes.c_long(self.numel)
        return int(function(ctypes.byref(job), ctypes.c_int(run), *places, ctypes.c_float(value), ctypes.c_int64(nth)))

    def _job(self, method: str, options: Sequence[int], merged: Tensor | None, *numbers: Tensor) -> tuple[_Job, list[object]]:
        """Return the arguments for a kernel, and the objects that they point to."""
        thetas = (ctypes.c_void_p * len(self.runs))(*map(_address, self.runs))
        kinds = (ctypes.c_int * len(self.runs))(*self.kinds)
        job = _Job(
            method=METHODS[method],
            runs=len(self.runs),
            base_kind=KINDS[self.base.dtype],
            base=self.base.data_ptr(),
            theta=ctypes.addressof(thetas),
            kinds=ctypes.addressof(kinds),
            options=(ctypes.c_int * 3)(*options),
        )
        if numbers:
            job.weights, job.numbers, job.last = (t.data_ptr() for t in numbers)
        if merged is not None and self.written:
            job.out, job.out_kind, job.scale = merged.data_ptr(), KINDS[self.written.dtype], self.written.scale
        elif merged is not None:
            job.merged = merged.data_ptr()
        return job, [thetas, kinds, numbers]

    def _run(
        self,
        method: str,
        weights: Tensor,
        numbers: Tensor | None,
        last: Tensor | None,
        options: Sequence[int],
        merged: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Run a kernel; return the sums (pieces, pairs and others) and the counts of every part."""
        runs = len(self.runs)
        numbers = (torch.zeros(runs) if numbers is None else numbers).float().contiguous()
        last = (torch.full((runs,), self.numel) if last is None else last).contiguous()
        job, _keep = self._job(method, options, merged, weights.float().contiguous(), numbers, last)
        parts = native.ranges(self.numel, PIECE)
        results = [
            (
                torch.zeros(-(-(stop - start) // PIECE), runs * (runs + 1) // 2 + 6, dtype=torch.float64),
                torch.zeros(runs + 2 * runs * runs + 4, dtype=torch.int64),
            )
            for start, stop in parts
        ]

        def work(index: int) -> None:
            start, stop = parts[index]
            outputs = [ctypes.c_void_p(t.data_ptr()) for t in results[index]]
            self._check(_kernels().merge(ctypes.byref(job), ctypes.c_long(start), ctypes.c_long(stop), *outputs))

        native.in_parallel(work, range(len(parts)))
        return results

    def _check(self, status: int) -> None:
        if status == 1:
            raise MemoryError(f"no memory to merge {self.name}")
        if status == 2 and self.written:
            self.written.finite = False
        if status > 2:
            where = f"{self.name} of run {self.labels[status - 3]}"
            raise BadInput("non-finite task vector", where=where, fix="leave this run out")


def open_stored(name: str, base: Checkpoint, runs: Sequence[Checkpoint], labels: Sequence[str]) -> StoredTensor | None:
    """Return one tensor in its stored dtype; None if the kernels do not support it."""
    if len(runs) > MOST_RUNS or base.info(name).dtype not in KINDS or native.library(KERNELS) is None:
        return None
    plain = [type(run).delta is Checkpoint.delta for run in runs]
    if any(dense and run.info(name).dtype not in KINDS for run, dense in zip(runs, plain, strict=True)):
        return None
    origin = base[name]
    found = [_vector(run, name, base, dense=dense) for run, dense in zip(runs, plain, strict=True)]
    if not origin.is_cpu or None in found:
        return None
    vectors, kinds = zip(*(each for each in found if each), strict=True)
    return StoredTensor(origin.contiguous(), vectors, kinds, tuple(labels), name)


def _vector(run: Checkpoint, name: str, base: Checkpoint, *, dense: bool) -> tuple[Tensor | Prepared | None, int] | None:
    """Return a run's tensor or its task vector, and its kind; None if the kernels do not support it."""
    if not dense and (factors := run.factors(name, base)) is not None:
        return factors.prepared(), FACTORS
    tensor = run[name] if dense else run.delta(name, base)
    if tensor is None:
        return None, STILL
    if not tensor.is_cpu or tensor.dtype not in KINDS or not (dense or tensor.dtype == torch.float32):
        return None
    return tensor.contiguous(), KINDS[tensor.dtype] if dense else DELTA


def _address(run: Tensor | Prepared | None) -> int | None:
    return run.address if isinstance(run, Prepared) else None if run is None else run.data_ptr()


def _kernels() -> ctypes.CDLL:
    compiled = native.library(KERNELS)
    assert compiled is not None, "ask `open_stored` first"
    return compiled
