"""An adapter over its base as a checkpoint: each tensor is baked on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.checkpoints import Checkpoint, TensorInfo, working_dtype


class BakedCheckpoint(Checkpoint):
    """θ = θ₀ + Δ, tensor by tensor, in fp32 (float64 where the base is).

    `info` reports the base's dtypes, so that a writer rounds θ once. `delta` returns the unrounded Δ: with bf16 weights of
    RMS 0.02 and a Δ of RMS 1e-4, a third of the weights would not change at all when baked.

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
        self.base = base
        self._changes = changes
        self._reopen = reopen
        self.source = source
        self.folder = base.folder
        self._adapter_folder = adapter_folder

    def __reduce__(self) -> tuple[Callable[[], BakedCheckpoint], tuple[()]]:
        return self._reopen, ()

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folder of the adapter."""
        return (self._adapter_folder,)

    def names(self) -> tuple[str, ...]:
        """Return the base's names."""
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        """Return the base's shape and dtype."""
        return self.base.info(name)

    def touched(self) -> tuple[str, ...]:
        """Return the names of the tensors that the adapter changes, sorted."""
        return tuple(self._changes)

    def __getitem__(self, name: str) -> Tensor:
        base = self.base[name]
        change = self._changes.get(name)
        if change is None:
            return base
        dtype = working_dtype(base.dtype)
        tensor = (base if change.replace is None else change.replace(base)).to(dtype)
        return tensor if change.delta is None else tensor + change.delta(dtype).to(tensor.device)

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Return the exact Δ, or None if the tensor is unchanged; over any other base, the plain difference."""
        if base is not self.base:
            return super().delta(name, base)
        change = self._changes.get(name)
        if change is None:
            return None
        if change.replace is not None or change.delta is None:
            return super().delta(name, base)
        return change.delta(working_dtype(base.info(name).dtype))
