"""LoHa (Hyeon-Woo et al. 2022) and LoKr (Edalati et al. 2022): products of matrices, element by element or as blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Formula, Index, require_columns


class Matrix(NamedTuple):
    """One of the two matrices, stored whole or as a product.

    Args:
        a: the matrix itself, (rows, columns, *kernel); or its left factor (rows, r); with a core (r, rows).
        b: the right factor, (r, columns), flattened or not.
        core: (r, r, *kernel): Σ core[i, j]·a[i, row]·b[j, column].
    """

    a: Tensor
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        if self.b is None:
            return tuple(self.a.shape)
        if self.core is None:
            return (self.a.shape[0], *self.b.shape[1:])
        return (self.a.shape[1], self.b.shape[1], *self.core.shape[2:])

    @property
    def rank(self) -> int | None:
        """r, or None if the matrix is stored whole."""
        return None if self.b is None else self.b.shape[0]

    def value(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        a = self.a.to(dtype)
        if self.b is None:
            return a
        b = self.b.to(dtype)
        if self.core is None:
            return (a @ b.flatten(1)).reshape(self.shape)
        return torch.einsum("ij...,jc,ir->rc...", self.core.to(dtype), b, a)

    def take(self, index: Index) -> Matrix:
        """Return some rows."""
        return self._replace(a=self.a[index] if self.core is None else self.a[:, index])


@dataclass(frozen=True)
class Hadamard(Additive):
    """ΔW = s·M₁∘M₂, with matrices (out, in, *kernel) or (out, columns)."""

    first: Matrix
    second: Matrix
    scale: float

    @property
    def rows(self) -> int:
        """Rows of either matrix."""
        return self.first.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept the shape of the matrices, the columns flattened or not."""
        rows, *columns = self.first.shape
        require_columns(shape, rows, tuple(columns), where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.first.value(dtype).mul(self.second.value(dtype)).mul_(self.scale).reshape(shape)

    def take(self, index: Index) -> Formula:
        """Return some rows of both matrices."""
        return replace(self, first=self.first.take(index), second=self.second.take(index))


@dataclass(frozen=True)
class Kronecker(Additive):
    """ΔW = s·M₁⊗M₂, with M₁ (a, c) and M₂ (b, d, *kernel), for W (ab, cd, *kernel)."""

    first: Matrix
    second: Matrix
    scale: float

    @property
    def rows(self) -> int:
        """The product of the rows."""
        return self.first.shape[0] * self.second.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept the product of the shapes; the kernel may be part of the columns of M₂."""
        columns = (self.first.shape[1] * self.second.shape[1], *self.second.shape[2:])
        require_columns(shape, self.rows, columns, where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        first, second = self.first.value(dtype), self.second.value(dtype).flatten(1).contiguous()
        return torch.kron(first.flatten(1) * self.scale, second).reshape(shape)
