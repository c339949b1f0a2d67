"""`Checkpoint`, the type of all weights: a read-only mapping from tensor names to tensors, loaded on demand."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.checkpoints.factors import Factors
from emomerge.checkpoints.finite import all_finite as all_finite
from emomerge.notebook import facts_table, paragraph
from emomerge.numerics.rounding import round_to
from emomerge.numerics.sums import PIECE, exact_sum, squared_row_lengths


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, known without reading its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Return the size of the data in bytes."""
        return self.numel * self.dtype.itemsize


class StoredFile(NamedTuple):
    """A model that is one file of its own, such as a checkpoint of an image model; models derived from it are one, too."""

    path: Path
    order: tuple[str, ...]
    """The tensor names in the order of their data."""
    metadata: Mapping[str, str]
    """The texts in its header."""


class Checkpoint(Mapping[str, Tensor]):
    """A read-only mapping name → tensor whose tensors are loaded on demand.

    Iteration is in sorted order of the names. The caller may keep the tensor that `checkpoint[name]` returns but must not
    change it.
    """

    source: str
    """Origin of the weights, for messages and model cards."""

    folder: Path | None = None
    """The folder with the configuration, tokenizer and the like of these weights, if there is one."""

    file: StoredFile | None = None
    """The one file that holds these weights, or those that they were made from; None for a folder of a library."""

    paths: tuple[Path, ...] = ()
    """The files that the tensors are read from, sorted; empty for weights that are computed or in memory."""

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders that may hold a tokenizer with which these weights were trained."""
        return () if self.folder is None else (self.folder,)

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without loading it."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        """Return whether a tensor of this name exists; `info` takes constant time in every checkpoint."""
        try:
            self.info(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def facts(self) -> dict[str, str]:
        """Return what these weights are, for display: source, layout, tensors, parameters, size, dtypes. Reads no data."""
        infos = [self.info(name) for name in self]
        dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
        return {
            "source": self.source,
            "layout": self._layout(),
            "tensors": f"{len(infos):,}",
            "parameters": f"{sum(info.numel for info in infos):,}",
            "size": f"{sum(info.nbytes for info in infos) / 1e6:,.1f} MB",
            "dtype": ", ".join(f"{count} × {dtype}" if len(dtypes) > 1 else dtype for dtype, count in dtypes.items()),
        }

    def _layout(self) -> str:
        if not self.paths:
            return "computed on demand"
        kinds = ", ".join(sorted({path.suffix.lstrip(".") for path in self.paths}))
        return f"one {kinds} file" if len(self.paths) == 1 else f"{len(self.paths)} {kinds} files"

    def _repr_html_(self) -> str:
        """Show what these weights are in a notebook."""
        name = type(self).__name__
        return paragraph(name, strong=True) + facts_table(self.facts())

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Return τ = θ − θ₀ of one tensor in fp32 (float64 if either is); None if it is known to be zero.

        A checkpoint that knows its delta exactly (a baked adapter) overrides this, so that τ is free of the rounding of
        θ₀ + Δ.
        """
        ours, theirs = self[name], base[name]
        dtype = working_dtype(ours.dtype, theirs.dtype)
        return ours.to(dtype) - theirs.to(dtype)

    def factors(self, name: str, base: Checkpoint) -> Factors | None:
        """Return τ of one tensor as products of factors, with the bits of `delta`; None if it is not known as such."""
        return None

    def with_base(self, name: str, base: Checkpoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return θ, θ₀ and τ of one tensor. A checkpoint that computes θ from τ overrides this to compute τ only once."""
        return self[name], base[name], self.delta(name, base)

    def rounded(self, name: str, dtype: torch.dtype, loss: RoundingLoss | None, out: Tensor | None = None) -> Tensor | None:
        """Return one tensor in another dtype, rounded once and finite, and add the rounding error to `loss`.

        None if the caller has to compute it from `with_base`; a checkpoint that can do all of it in one pass overrides this.

        Args:
            name: name of the tensor.
            dtype: of the result.
            loss: receives the rounding error, if given.
            out: contiguous memory that may be used for the result, in its shape and dtype.
        """
        return None


class RoundingLoss:
    """Error of rounding θ = θ₀ + τ, summed over all tensors that change.

    Args:
        base: θ₀.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self._moved = self._unchanged = 0
        self._squared_errors: list[float] = []
        self._squared_lengths: list[float] = []

    def add(self, theta0: Tensor, tau: Tensor, rounded: Tensor) -> None:
        """Add one tensor.

        Args:
            theta0: θ₀ as stored.
            tau: τ in the dtype of the arithmetic.
            rounded: the tensor that is written for θ₀ + τ; all three have one shape.
        """
        pieces = (tensor.flatten().split(PIECE) for tensor in (theta0, tau, rounded.to(tau.device)))
        for old, step, new in zip(*pieces, strict=True):
            change = new.to(step.dtype) - old.to(step.dtype)
            moved = int(step.count_nonzero())
            if old.dtype == new.dtype:  # an unchanged weight is written as it is
                self._unchanged += moved - int(change.count_nonzero())
            else:
                self._unchanged += int(((new == round_to(old, new.dtype)) & (step != 0)).count_nonzero())
            self._moved += moved
            self._squared_errors += squared_row_lengths(change.sub_(step))
            self._squared_lengths += squared_row_lengths(step)

    def add_sums(self, moved: int, unchanged: int, squared_errors: list[float], squared_lengths: list[float]) -> None:
        """Add sums over some elements that were computed elsewhere; see `add`."""
        self._moved += moved
        self._unchanged += unchanged
        self._squared_errors += squared_errors
        self._squared_lengths += squared_lengths

    def join(self, other: RoundingLoss) -> None:
        """Add the sums of another instance."""
        self.add_sums(other._moved, other._unchanged, other._squared_errors, other._squared_lengths)

    def figures(self) -> dict[str, float | None]:
        """Return the figures, ready for JSON; None if nothing changed or the sums overflow.

        - `unchanged`: the share of the weights with τ ≠ 0 that are written with the base's value.
        - `relative_error`: ‖round(θ₀ + τ) − θ₀ − τ‖ / ‖τ‖.
        """
        length = math.sqrt(exact_sum(self._squared_lengths))
        error = math.sqrt(exact_sum(self._squared_errors)) / length if length else math.nan
        return {
            "unchanged": self._unchanged / self._moved if self._moved else None,
            "relative_error": error if math.isfinite(error) else None,
        }


class OnDevice(Checkpoint):
    """The tensors of a checkpoint on a device, moved there one by one, on demand."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self.device = device
        self.source = checkpoint.source
        self.folder = checkpoint.folder
        self.file = checkpoint.file

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders of the checkpoint."""
        return self._checkpoint.tokenizers_from

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return self._checkpoint.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor."""
        return self._checkpoint.info(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint[name].to(self.device)

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Return τ on the device; exact if the checkpoint knows its delta from this base."""
        if type(self._checkpoint).delta is Checkpoint.delta:
            return super().delta(name, base)
        delta = self._checkpoint.delta(name, base._checkpoint if isinstance(base, OnDevice) else base)
        return None if delta is None else delta.to(self.device)


class MemoryCheckpoint(Checkpoint):
    """Tensors that are already in memory, such as a model's state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str = "memory", folder: Path | None = None) -> None:
        self._tensors = {name: tensors[name] for name in sorted(tensors)}
        self.source = source
        self.folder = folder

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor."""
        tensor = self._tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype for arithmetic on tensors of these dtypes: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
