"""DoRA: the direction changes by another formula, the magnitude is stored (Liu et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, Index, require_shape


@dataclass(frozen=True)
class Decomposed(Formula):
    """W′ = m·V/‖V‖ with V = W + ΔW.

    Args:
        direction: the formula of ΔW.
        magnitude: m, (n,).
        axis: 0 if m belongs to the output rows and ‖V‖ is the norm of each, 1 for the input channels.
    """

    direction: Formula
    magnitude: Tensor
    axis: int
    additive = False

    @property
    def rows(self) -> int | None:
        """Those of the direction."""
        return self.direction.rows

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept what the direction accepts."""
        self.direction.check(shape, where=where)
        require_shape((shape[self.axis],), tuple(self.magnitude.shape), where=f"{where}, magnitude of axis {self.axis}")

    def _changed(self, weight: Tensor) -> Tensor:
        return decomposed(self.direction._changed(weight), self.magnitude, self.axis)

    def take(self, index: Index) -> Formula | None:
        """Return some output rows; None if the norms run over all of them."""
        direction = self.direction.take(index) if self.axis == 0 else None
        return None if direction is None else Decomposed(direction, self.magnitude[index], 0)


def decomposed(moved: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Return m·V/‖V‖, in place of V.

    Args:
        moved: V.
        magnitude: m, one number for each index of `axis`, in any shape.
        axis: the axis that m belongs to; norms run over the others.
    """
    norm = torch.linalg.vector_norm(moved, dim=[other for other in range(moved.ndim) if other != axis], keepdim=True)
    norm.clamp_(min=math.sqrt(torch.finfo(norm.dtype).tiny))  # a row of zeros stays one
    return moved.mul_(magnitude.to(moved).reshape(norm.shape) / norm)
