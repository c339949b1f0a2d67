"""LoRA and LoCon: a product of two factors, with or without a core (Hu et al. 2021; Tucker as in LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Index, require_columns
from emomerge.adapters.low_rank import product
from emomerge.checkpoints.factors import Term
from emomerge.numerics.threads import one_thread


@dataclass(frozen=True)
class LowRankProduct(Additive):
    """ΔW = s·BA.

    Args:
        up: B (out, m).
        down: A (r, in, *kernel); with a core, (r, in), and m may differ from r.
        scale: s.
        core: (m, r, *kernel), which stands between the factors of a convolution.
    """

    up: Tensor
    down: Tensor
    scale: float
    core: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of B."""
        return self.up.shape[0]

    @property
    def _columns(self) -> tuple[int, ...]:
        return (*self.down.shape[1:], *(() if self.core is None else self.core.shape[2:]))

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept (out, in, *kernel), and the linear layer of a 1×1 convolution or the other way round."""
        require_columns(shape, self.rows, self._columns, where=where)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """Return A, or the product of the core and A, as a matrix (m, columns)."""
        if self.core is None:
            return self.down.flatten(1).to(dtype)
        return torch.einsum("mr...,ri->mi...", self.core.to(dtype), self.down.to(dtype)).flatten(1)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return product(self._matrix(dtype), self.up, self.scale, dtype).reshape(shape)

    def take(self, index: Index) -> LowRankProduct:
        """Return some rows of B."""
        return replace(self, up=self.up[index])

    def term(self) -> Term:
        """Return A and B."""
        with one_thread():
            return Term(self._matrix(torch.float32), self.up, self.scale)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and s·B."""
        return self._matrix(dtype), self.up.to(dtype) * self.scale
