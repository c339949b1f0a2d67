"""MiSS, and Bone as it was called before: a small matrix that is added to each slice of the columns (Kang and Yin 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Formula, require_shape
from emomerge.adapters.peft.kind import Count, Kind, Module, Settings


class MissSettings(Settings):
    """The height of the slices and which of the three forms it is."""

    r: Count
    mini_r: int | None = None
    init_weights: bool | str | None = None


@dataclass(frozen=True)
class Repeated(Additive):
    """ΔW: column j is row j mod r of a matrix.

    Args:
        block: (r, out).
    """

    block: Tensor

    @property
    def rows(self) -> int:
        """Columns of the matrix."""
        return self.block.shape[1]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a matrix of as many rows."""
        require_shape(shape, (self.rows, *shape[1:2]), where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        columns = torch.arange(shape[1]) % len(self.block)
        return self.block.to(dtype)[columns].T.contiguous()


@dataclass(frozen=True)
class BlockAffine(Formula):
    """W′ = W + WB + B for each r×r block of W; the blocks in one row of blocks share B (the variant "bat").

    Args:
        blocks: B, (out/r, r, r).
    """

    blocks: Tensor
    additive = False

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a matrix of as many rows that is made of whole blocks."""
        size = self.blocks.shape[1]
        require_shape(shape, (self.rows, shape[1] // size * size) if len(shape) > 1 else (self.rows, size), where=where)

    def _changed(self, weight: Tensor) -> Tensor:
        blocks, size = self.blocks.to(weight), self.blocks.shape[1]
        grid = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)  # (out/r, in/r, r, r)
        moved = grid + grid @ blocks[:, None] + blocks[:, None]
        changed: Tensor = moved.transpose(1, 2).flatten(2).flatten(0, 1)
        return changed


def _read(name: str, module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    form, r = module.setting("init_weights", True), module.setting("r")
    if form == "bat":
        return {"weight": BlockAffine(module.take(name, module.out // r, r, r))}
    if form == "mini":
        block = module.take(name, r, int(module.setting("mini_r", 1)))
        return {"weight": Repeated(block.repeat(1, module.out // block.shape[1]))}
    return {"weight": Repeated(module.take(name, r, module.out))}


_TRAINING = frozenset({"miss_dropout", "bone_dropout"})
MISS = Kind("MiSS", ("miss_block",), partial(_read, "miss_block"), MissSettings, _TRAINING)
BONE = Kind("Bone", ("bone_block",), partial(_read, "bone_block"), MissSettings, _TRAINING)
