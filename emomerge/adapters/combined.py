"""Several adapters over one base, each with a strength, as a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.adapters.baked import BakedCheckpoint, ChangedCheckpoint
from emomerge.checkpoints import Checkpoint
from emomerge.checkpoints.factors import Factors, summed
from emomerge.errors import BadInput


class Strong(NamedTuple):
    """An adapter and the strength at which it is applied."""

    adapter: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Strong:
        """Read `PATH` or `PATH=STRENGTH`; a path that exists is one, whatever is in it.

        Raises:
            BadInput: the strength is not a finite number.
        """
        path, sign, number = text.rpartition("=")
        if not sign or Path(text).exists():
            return cls(text)
        try:
            strength = float(number)
        except ValueError:
            if not Path(path).exists():
                return cls(text)
            strength = math.nan
        if not math.isfinite(strength):
            raise BadInput("a strength is a number", where=path, found=repr(number), fix="write it as ADAPTER=0.8")
        return cls(path, strength)


class CombinedCheckpoint(ChangedCheckpoint):
    """θ₀ + Σ_t s_t(θ_t − θ₀), where θ_t is the base with adapter t alone at strength 1.

    Every change is relative to the base itself, also of kinds that are not additive (DoRA, OFT, GLoRA, replaced tensors), so
    that the order of the adapters decides only the order of the sum. It is made in float32, or float64 where the base is.

    Args:
        base: θ₀.
        adapters: the θ_t, over this base, with their strengths s_t.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[BakedCheckpoint, float]]) -> None:
        super().__init__(base, source=" + ".join(f"{strength:g} · {adapter.source}" for adapter, strength in adapters))
        self.adapters = tuple(adapters)

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders of the adapters."""
        return tuple(folder for adapter, _ in self.adapters for folder in adapter.tokenizers_from)

    def touched(self) -> tuple[str, ...]:
        """Return the names of the tensors that any adapter changes, sorted."""
        return tuple(sorted({name for adapter, strength in self.adapters if strength for name in adapter.touched()}))

    def __getitem__(self, name: str) -> Tensor:
        changing = self._changing(name)
        if len(changing) == 1 and changing[0][1] == 1:
            return changing[0][0][name]  # of a tensor that is replaced, free of the rounding of θ₀ + (θ − θ₀)
        return self._sum(name)

    def _changing(self, name: str) -> list[tuple[BakedCheckpoint, float]]:
        return [(adapter, strength) for adapter, strength in self.adapters if strength and adapter.changes(name)]

    def additive(self, name: str) -> bool:
        """Return whether no adapter replaces a tensor."""
        return all(adapter.additive(name) for adapter, _ in self._changing(name))

    def _factors(self, name: str) -> Factors | None:
        parts = []
        for adapter, strength in self._changing(name):
            if (factors := adapter.factors(name, self.base)) is None:
                return None
            parts.append(factors.times(strength))
        return summed(self.info(name).shape, parts) if parts else None

    def change(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return Σ_t s_t(θ_t − θ₀), in the order of the adapters."""
        total: Tensor | None = None
        for adapter, strength in self._changing(name):
            step = adapter.delta(name, self.base)
            if step is not None:
                step = step.to(dtype)
                step = step if strength == 1 else step * strength
                total = step if total is None else total + step
        return total
