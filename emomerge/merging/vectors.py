"""The task vectors τ_t = θ_t − θ₀ of several runs over one base, streamed tensor by tensor."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emomerge.checkpoints import Checkpoint, TensorInfo, all_finite, working_dtype
from emomerge.checkpoints.factors import summed
from emomerge.checkpoints.names import MAYBE_TIED
from emomerge.errors import BadInput
from emomerge.merging.buffers import is_counter, is_statistic, largest, mean_statistic
from emomerge.merging.native import StoredTensor, open_stored
from emomerge.merging.thresholds import Bracket, sample_step
from emomerge.native import in_parallel
from emomerge.numerics.sums import gram

CHUNK = 2**17
"""Elements per piece; the pieces of five runs and a few temporaries fit into the cache."""

Loss = Callable[[Checkpoint], float]
Rule = Callable[[str, Tensor], Tensor]
"""(tensor name, deltas (runs, n)) → τ (n,), element by element."""


class BasePlusDelta(Checkpoint):
    """θ₀ + scale·τ for each tensor, in the dtype of τ; the base's own tensor if τ is zero."""

    def __init__(self, base: Checkpoint, *, scale: float = 1.0, source: str = "candidate") -> None:
        self.base = base
        self.scale = scale
        self.source = source
        self.folder = base.folder
        self.file = base.file

    @abstractmethod
    def tau(self, name: str) -> Tensor | None:
        """Return the delta of a tensor before scaling, or None if it is zero."""

    def names(self) -> tuple[str, ...]:
        """Return the base's tensor names, sorted."""
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the base's tensor; writers round to this dtype."""
        return self.base.info(name)

    def scale_of(self, name: str) -> float:
        """Return the factor on a tensor's delta; running statistics are never scaled."""
        return 1.0 if is_statistic(name) else self.scale

    def __getitem__(self, name: str) -> Tensor:
        return self.with_base(name, self.base)[0]

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Return scale·τ, free of the sum's rounding error if `base` is this checkpoint's own base."""
        if base is not self.base:
            return super().delta(name, base)
        tau, scale = self.tau(name), self.scale_of(name)
        return tau if tau is None or scale == 1 else scale * tau

    def with_base(self, name: str, base: Checkpoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return θ₀ + scale·τ, θ₀ and scale·τ."""
        if base is not self.base:
            return super().with_base(name, base)
        old, delta = base[name], self.delta(name, base)
        return (old, old, None) if delta is None else (old.to(delta.dtype, copy=True).add_(delta.to(old.device)), old, delta)


class Candidate(BasePlusDelta):
    """A merge to be evaluated, whose τ is a function of the tensor's name."""

    def __init__(self, base: Checkpoint, tau: Callable[[str], Tensor | None], *, scale: float = 1.0) -> None:
        super().__init__(base, scale=scale)
        self._tau = tau

    def tau(self, name: str) -> Tensor | None:
        """Return τ as computed by the function."""
        return self._tau(name)


class TaskVectors:
    """The runs' task vectors, and the held-out loss of anything built from them.

    Args:
        base: θ₀.
        runs: θ_t, each with the base's floating tensors.
        labels: a name for each run.
        held_out_loss: function that measures the loss of a checkpoint on held-out data, if available.
        run_losses: the held-out loss of each single run, if known.

    Raises:
        BadInput: a run lacks a floating-point tensor of the base, or has an additional one, or one of a different shape.
    """

    def __init__(
        self,
        base: Checkpoint,
        runs: Sequence[Checkpoint],
        *,
        labels: Sequence[str],
        held_out_loss: Loss | None = None,
        run_losses: Sequence[float] | None = None,
    ) -> None:
        self.base = base
        self.runs = tuple(runs)
        self.labels = tuple(labels)
        self.floating = _floating(base)
        self.names = tuple(name for name in self.floating if not is_statistic(name))
        """The tensors that methods merge."""
        self.statistics = tuple(name for name in self.floating if is_statistic(name))
        for run, label in zip(self.runs, self.labels, strict=True):
            _check_headers(base, run, label)
        self.numel = sum(base.info(name).numel for name in self.names)
        """Number of elements of one task vector."""
        self.dtype = working_dtype(*(theta.info(name).dtype for theta in (base, *runs) for name in self.floating))
        """The widest dtype of any tensor."""
        self.weights: Mapping[str, tuple[float, ...]] = dict.fromkeys(self.floating, (1.0,) * len(self.runs))
        """The weights of the runs, by tensor."""
        self.estimated: Mapping[str, Tensor] = {}
        """Running statistics that were re-estimated for the merged weights."""
        self.held_out_loss = held_out_loss
        self._run_losses = run_losses

    def __len__(self) -> int:
        return len(self.runs)

    def deltas(self, name: str) -> list[Tensor | None]:
        """Return each run's τ of one tensor. Raises BadInput if one is not finite."""
        deltas = [run.delta(name, self.base) for run in self.runs]
        for label, delta in zip(self.labels, deltas, strict=True):
            if delta is not None and delta.numel() and not torch.stack(delta.aminmax()).isfinite().all():
                raise BadInput("non-finite task vector", where=f"{name} of run {label}", fix="leave this run out")
        return deltas

    def rows(self, name: str) -> list[Tensor] | None:
        """Return each run's τ of a tensor, flat, in the dtype of the arithmetic; None if no run moved it."""
        deltas = self.deltas(name)
        moved = [delta for delta in deltas if delta is not None and delta.numel()]
        if not moved:
            return None
        dtype = working_dtype(self.base.info(name).dtype, *(delta.dtype for delta in moved))
        zero = torch.zeros_like(moved[0])
        return [(zero if delta is None else delta).flatten().to(dtype) for delta in deltas]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield stacked flat pieces (runs, n) of the runs' τ of a tensor; none if no run moved it."""
        rows = self.rows(name)
        if rows is not None:
            yield from (piece for _, piece in blocks(rows, CHUNK))

    def all_pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the flat pieces (runs, n) of every tensor that moved, with its name."""
        for name in self.names:
            for piece in self.pieces(name):
                yield name, piece

    def inner_products(self) -> Tensor:
        """Return G = [⟨τ_s, τ_t⟩] over all tensors, (runs, runs), in float64."""
        g = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.names:
            if (rows := self.rows(name)) is not None:
                g += gram([row.unsqueeze(0) for row in rows])[0].cpu()
        return g

    def stored(self, name: str) -> StoredTensor | None:
        """Return a tensor in its stored dtype for the compiled kernels; None if they do not support it."""
        return open_stored(name, self.base, self.runs, self.labels)

    def kth_magnitude_native(self, ranks: Sequence[int]) -> Tensor | None:
        """Find order statistics over all tensors as `thresholds.kth_magnitude` does, with compiled code, in float32.

        Returns None if a tensor is not supported, or if the rank lies outside the bracket that a sample gave.
        """
        runs, step = range(len(self.runs)), sample_step(self.numel)
        samples: list[list[NDArray[np.int32]]] = [[] for _ in runs]
        if self.dtype != torch.float32 or not self.numel:
            return None
        for name in self.names:
            if (stored := self.stored(name)) is None:
                return None
            for run in runs:
                samples[run].append(stored.sample(run, step))
        brackets = [Bracket.of(np.concatenate(some), rank, self.numel) for some, rank in zip(samples, ranks, strict=True)]
        for name in self.names:
            if (stored := self.stored(name)) is not None:
                in_parallel(lambda run: stored.collect(run, brackets[run]), runs)
        found = [bracket.find(rank) for bracket, rank in zip(brackets, ranks, strict=True)]
        return None if None in found else torch.tensor([ranked.value for ranked in found if ranked])

    def weights_for(self, name: str, deltas: Tensor) -> Tensor:
        """Return the weights of the runs (runs,) for a tensor, rounded to the deltas' dtype."""
        return deltas.new_tensor(self.weights[name])

    def require_loss(self, what: str) -> Loss:
        """Return the held-out loss function. Raises BadInput if there is none; `what` names the choice that needs it."""
        if self.held_out_loss is None:
            raise BadInput(f"{what} is chosen by held-out loss, which needs data", fix="give a recipe with `--recipe`")
        return self.held_out_loss

    def run_losses(self, what: str) -> list[float]:
        """Return the held-out loss of each single run, measured at most once. Raises BadInput if one is not finite."""
        if self._run_losses is None:
            loss = self.require_loss(what)
            self._run_losses = [float(loss(run)) for run in self.runs]
        for label, value in zip(self.labels, self._run_losses, strict=True):
            if not math.isfinite(value):
                raise BadInput("held-out loss not finite", where=f"run {label}", found=value, fix="leave this run out")
        return list(self._run_losses)

    @property
    def known_run_losses(self) -> list[float] | None:
        """The held-out loss of each single run, if it was given or has been measured."""
        return None if self._run_losses is None else list(self._run_losses)

    def loss_of(self, rule: Rule, what: str, *, weights: Mapping[int, float] | None = None, over: int = 1) -> float:
        """Return the held-out loss of θ₀ + rule(τ), NaN as infinity.

        Args:
            rule: merges a tensor.
            what: names the choice for errors.
            weights: the numbers of some runs → w_t, if the rule is Σ_t w_t τ_t / `over`. Factors of adapters then become one
                tensor at once, with the same bits.
            over: the divisor.
        """

        def tau(name: str) -> Tensor | None:
            if is_statistic(name) or not merges(self.base.info(name)):
                return self.statistic(name)
            if weights is not None and (total := self._sum_of_factors(name, weights)) is not None:
                return total if over == 1 else total.div_(over)
            parts = [rule(name, piece) for piece in self.pieces(name)]
            return torch.cat(parts).view(self.base.info(name).shape) if parts else None

        return finite_or_inf(self.require_loss(what)(Candidate(self.base, tau)))

    def _sum_of_factors(self, name: str, weights: Mapping[int, float]) -> Tensor | None:
        """Return Σ_t w_t τ_t of a tensor; None if it is not finite, or not one product of factors in each of these runs."""
        parts = [self.runs[run].factors(name, self.base) for run in weights]
        known = [part for part in parts if part is not None and len(part.terms) == 1]
        if len(known) < len(parts) or not known:
            return None
        scaled = [part.times(weight) for part, weight in zip(known, weights.values(), strict=True)]
        total = summed(self.base.info(name).shape, scaled).dense()
        return total if all_finite(total) else None

    def statistic(self, name: str) -> Tensor | None:
        """Return the delta of a running statistic; None if no run moved it, and for a tensor that is none."""
        if name in self.estimated:
            estimated, base = self.estimated[name], self.base[name]
            return estimated.to(base.device, dtype := working_dtype(base.dtype)) - base.to(dtype)
        rows = self.rows(name) if name in self.statistics else None
        if rows is None:
            return None
        mean = mean_statistic(name, rows, self.base[name].flatten(), self.weights[name])
        return mean.view(self.base.info(name).shape)

    def counter(self, name: str) -> Tensor | None:
        """Return the merged value of a counter; None for a tensor that is none."""
        return largest(name, self.base[name], self.runs) if is_counter(self.base.info(name)) else None

    def moved_buffers(self) -> tuple[list[str], list[str]]:
        """Return the running statistics and the counters that differ between the base and a run."""
        counters = [name for name in self.base if is_counter(self.base.info(name))]

        def differs(name: str) -> bool:
            return any(name in run and not torch.equal(run[name], self.base[name]) for run in self.runs)

        averaged = [name for name in self.statistics if name not in self.estimated and differs(name)]
        return averaged, [name for name in counters if differs(name)]

    def check_equal(self, name: str) -> None:
        """Raise BadInput if a tensor that is not merged differs between the base and a run that has it."""
        counts = is_counter(self.base.info(name))
        for run, label in zip(self.runs, self.labels, strict=True):
            if name not in run or (counts and is_counter(run.info(name))):
                continue
            if not (run.info(name) == self.base.info(name) and _same_bytes(run[name], self.base[name])):
                raise BadInput(
                    "a tensor that cannot be merged differs from the base's",
                    where=f"{name} of run {label}",
                    expected=f"the base's {_describe(self.base, name)}",
                    found=f"another {_describe(run, name)}",
                )


def blocks(rows: Sequence[Tensor], size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield flat tensors (n,) in stacked pieces (runs, size), each with the offset of its first element."""
    for start in range(0, len(rows[0]), size):
        yield start, torch.stack([row[start : start + size] for row in rows])


def merges(info: TensorInfo) -> bool:
    """Return whether a tensor is merged: floating-point ones are, except FP8, which needs the scales stored with it."""
    return info.dtype.is_floating_point and info.dtype.itemsize > 1


def finite_or_inf(loss: float) -> float:
    """Make a loss comparable: NaN counts as infinite."""
    return math.inf if math.isnan(loss) else float(loss)


def _floating(checkpoint: Checkpoint) -> tuple[str, ...]:
    return tuple(name for name in checkpoint.names() if merges(checkpoint.info(name)))


def _check_headers(base: Checkpoint, run: Checkpoint, label: str) -> None:
    """Check that the run has exactly the base's floating-point tensors, each in the base's shape."""
    present, ours, theirs = set(run.names()), dict.fromkeys(_floating(base)), _floating(run)
    for name in ours:
        where = f"{name} of run {label}"
        if name not in present:
            raise BadInput("run lacks a tensor", where=where, expected=_describe(base, name))
        if not merges(run.info(name)) or run.info(name).shape != base.info(name).shape:
            expected, found = _describe(base, name), _describe(run, name)
            what, shapes = "run does not fit the base", (base.info(name).shape, run.info(name).shape)
            if not MAYBE_TIED.search(name) or shapes[0][1:] != shapes[1][1:] or not all(map(len, shapes)):
                raise BadInput(what, where=where, expected=expected, found=found)
            fix = f"give both the same tokens first: model.resize_token_embeddings({max(shapes)[0]}) in transformers"
            raise BadInput(what, where=where, expected=expected, found=found, fix=fix)
    for name in theirs:
        if name not in ours:
            where, found = f"{name} of run {label}", _describe(run, name)
            raise BadInput("run has a tensor that the base lacks", where=where, found=found)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _describe(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
