"""What every room passes around: a read-only mapping from tensor names to tensors, loaded on demand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from emomerge.checkpoints.rounding import RoundingLoss


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, known without reading its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.numel * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """A read-only mapping name → tensor whose tensors are loaded when they are asked for.

    Iteration is in sorted order of the names. `ckpt[name]` returns a tensor that the caller may keep but not change.
    """

    source: str
    """Where the weights come from, for messages and model cards."""

    folder: Path | None = None
    """The folder whose config, tokenizer and the like belong to these weights, if there is one."""

    paths: tuple[Path, ...] = ()
    """The files that the tensors are read from, sorted; empty for weights that are computed or in memory."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, without loading it."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of this name exists; asks `info`, which every checkpoint answers in constant time."""
        try:
            self.info(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """τ = θ − θ₀ of one tensor in fp32 (float64 where either is); None where it is known to be zero.

        A checkpoint that knows its delta exactly (a baked adapter) overrides this, so that no rounding of
        the sum θ₀ + Δ enters τ.
        """
        ours, theirs = self[name], base[name]
        dtype = working_dtype(ours.dtype, theirs.dtype)
        return ours.to(dtype) - theirs.to(dtype)

    def with_base(self, name: str, base: Checkpoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """θ, θ₀ and τ of one tensor; a checkpoint that computes θ from τ overrides this, so that it does so once."""
        return self[name], base[name], self.delta(name, base)

    def rounded(self, name: str, dtype: torch.dtype, loss: RoundingLoss | None) -> Tensor | None:
        """One tensor in another dtype, rounded once and finite, with what that takes added to `loss`.

        None where it has to be made from `with_base`; a checkpoint that can do all of it in one reading overrides this.
        """
        return None


class OnDevice(Checkpoint):
    """The tensors of a checkpoint on a device, moved there one by one when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self.device = device
        self.source = checkpoint.source
        self.folder = checkpoint.folder

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return self._checkpoint.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor."""
        return self._checkpoint.info(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint[name].to(self.device)

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """τ on the device; exact where the checkpoint knows it over its base."""
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
        """All tensor names, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor."""
        tensor = self._tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on such tensors runs in: float64 where one is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: both pass through the minimum or the maximum, so no copy is needed."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # FP8 has no minimum on some devices
        tensor = tensor.float()
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
