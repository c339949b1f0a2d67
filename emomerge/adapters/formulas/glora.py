"""GLoRA: LoRA, and a low-rank map of the input of W (Chavan et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, Index, require_shape
from emomerge.adapters.formulas.lora import LowRankProduct


@dataclass(frozen=True)
class GeneralizedLora(Formula):
    """W′ = W + s·(B₁B₂ + W A₁A₂), with A₁A₂ acting on the input channels at each position of the kernel.

    Args:
        product: s·B₁B₂.
        a1: A₁ (in, r).
        a2: A₂ (r, in).
    """

    product: LowRankProduct
    a1: Tensor
    a2: Tensor
    additive = False

    @property
    def rows(self) -> int:
        """Rows of B₁."""
        return self.product.rows

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept (out, in, *kernel)."""
        self.product.check(shape, where=where)
        require_shape(tuple(shape[1:2]), (len(self.a1),), where=f"{where}, input channels")

    def _changed(self, weight: Tensor) -> Tensor:
        through = torch.einsum("oi...,ir->or...", weight, self.a1.to(weight))
        mapped = torch.einsum("or...,rj->oj...", through, self.a2.to(weight)).mul_(self.product.scale)
        return mapped.add_(weight).add_(self.product._delta(tuple(weight.shape), weight.dtype))

    def take(self, index: Index) -> Formula:
        """Return some output rows."""
        return replace(self, product=self.product.take(index))
