"""An adapter over its base as a checkpoint: each tensor is baked on demand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.checkpoints import Checkpoint, RoundingLoss, TensorInfo, rounded_sum, working_dtype
from emomerge.checkpoints.factors import Factors, compiled


class ChangedCheckpoint(Checkpoint):
    """A base some of whose tensors are changed; `info` reports the base's dtypes, so that a writer rounds θ once.

    Args:
        base: θ₀.
        source: what changes it.
    """

    def __init__(self, base: Checkpoint, *, source: str) -> None:
        self.base = base
        self.source = source
        self.folder = base.folder
        self.file = base.file

    def names(self) -> tuple[str, ...]:
        """Return the base's names."""
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        """Return the base's shape and dtype."""
        return self.base.info(name)

    @abstractmethod
    def touched(self) -> tuple[str, ...]:
        """Return the names of the tensors that are changed, sorted."""

    def facts(self) -> dict[str, str]:
        """Return what these weights are, with the base and the adapters."""
        changed = f"{len(self.touched())} of {len(self)} tensors"
        return {**super().facts(), "base": self.base.source, "adapters": self.source, "changed": changed}

    @abstractmethod
    def additive(self, name: str) -> bool:
        """Return whether the change of a tensor does not depend on the base."""

    @abstractmethod
    def change(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return Δ, in the given dtype; None if the tensor is unchanged."""

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Return the exact Δ, or None if the tensor is unchanged; over any other base, the plain difference."""
        return super().delta(name, base) if base is not self.base else self.change(name, self._working_dtype(name))

    def _working_dtype(self, name: str) -> torch.dtype:
        return working_dtype(self.base.info(name).dtype)

    def _sum(self, name: str) -> Tensor:
        base, delta = self.base[name], self.change(name, self._working_dtype(name))
        return base if delta is None else base.to(delta.dtype) + delta.to(base.device)

    def with_base(self, name: str, base: Checkpoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return θ, θ₀ and Δ of one tensor, with Δ computed only once."""
        if base is not self.base:
            return super().with_base(name, base)
        if not self.additive(name):
            theta, old = self[name], base[name]
            return theta, old, theta - old.to(theta.dtype)
        old, delta = base[name], self.change(name, self._working_dtype(name))
        return (old, old, None) if delta is None else (old.to(delta.dtype) + delta.to(old.device), old, delta)

    @abstractmethod
    def _factors(self, name: str) -> Factors | None:
        """Return Δ in float32 as products of factors; None if it is not known as such, or the tensor is unchanged."""

    def factors(self, name: str, base: Checkpoint) -> Factors | None:
        """Return Δ as products of factors, where it is such and the base is not wider than float32."""
        return self._factors(name) if base is self.base and self._working_dtype(name) == torch.float32 else None

    def rounded(self, name: str, dtype: torch.dtype, loss: RoundingLoss | None, out: Tensor | None = None) -> Tensor | None:
        """Return θ₀ + Δ, rounded once, in a single pass; None if the tensor is unchanged or replaced, or cannot be."""
        if not self.additive(name) or (loss is not None and loss.base is not self.base):
            return None
        factors = self.factors(name, self.base) if compiled() else None
        delta = self.change(name, self._working_dtype(name)) if factors is None else factors
        return None if delta is None else rounded_sum(self.base[name], delta, dtype, loss, out)


class BakedCheckpoint(ChangedCheckpoint):
    """θ = θ₀ + Δ, tensor by tensor, in fp32 (float64 where the base is).

    `delta` returns the unrounded Δ: with bf16 weights of RMS 0.02 and a Δ of RMS 1e-4, a third of the weights would not change
    at all when baked.

    Args:
        base: θ₀.
        changes: the effect of the adapter on each base tensor that it changes, by name.
        source: the adapter.
        adapter_folder: its folder, which may hold a tokenizer.
        reopen: reads the adapter again, in a process that this checkpoint is sent to.
    """

    def __init__(
        self, base: Checkpoint, changes: dict[str, Change], *, source: str, adapter_folder: Path,
        reopen: Callable[[], BakedCheckpoint],
    ) -> None:  # fmt: skip
        super().__init__(base, source=source)
        self._changes = changes
        self._reopen = reopen
        self._adapter_folder = adapter_folder

    def __reduce__(self) -> tuple[Callable[[], BakedCheckpoint], tuple[()]]:
        return self._reopen, ()

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folder of the adapter."""
        return (self._adapter_folder,)

    def touched(self) -> tuple[str, ...]:
        """Return the names of the tensors that the adapter changes, sorted."""
        return tuple(self._changes)

    def changes(self, name: str) -> bool:
        """Return whether the adapter changes a tensor."""
        return name in self._changes

    def additive(self, name: str) -> bool:
        """Return whether the change of a tensor does not depend on the base."""
        change = self._changes.get(name)
        return change is None or (change.replace is None and change.delta is not None)

    def __getitem__(self, name: str) -> Tensor:
        change = self._changes.get(name)
        if change is None or self.additive(name):
            return self._sum(name)
        base, dtype = self.base[name], self._working_dtype(name)
        tensor = (base if change.replace is None else change.replace(base)).to(dtype)
        return tensor if change.delta is None else tensor + change.delta(dtype).to(tensor.device)

    def change(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return Δ; of a tensor that is replaced, the difference."""
        change = self._changes.get(name)
        if change is None:
            return None
        if change.replace is None and change.delta is not None:
            return change.delta(dtype)
        return self[name].to(dtype) - self.base[name].to(dtype)

    def _factors(self, name: str) -> Factors | None:
        change = self._changes.get(name)
        return change.factors() if change is not None and change.factors is not None and change.replace is None else None
