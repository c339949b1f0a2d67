"""IA³: a factor for each output row or input channel (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, Index, require_shape


@dataclass(frozen=True)
class Scaled(Formula):
    """W′ = W·(1 + w), w along the output rows or the input channels.

    Args:
        factor: w, (n,).
        axis: 0 for output rows, 1 for input channels.
    """

    factor: Tensor
    axis: int
    additive = False

    @property
    def rows(self) -> int | None:
        """Any number if w belongs to the input."""
        return len(self.factor) if self.axis == 0 else None

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight whose axis has the length of w."""
        found = tuple(shape[self.axis : self.axis + 1])
        require_shape(found, tuple(self.factor.shape), where=f"{where}, axis {self.axis} of {tuple(shape)}")

    def _changed(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return weight * (1 + self.factor.to(weight)).reshape(shape)

    def take(self, index: Index) -> Formula:
        """Return some rows of w, or w itself if it belongs to the input."""
        return Scaled(self.factor[index], 0) if self.axis == 0 else self
