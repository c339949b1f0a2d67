"""What the tensors of an adapter do to one parameter of the base."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from emomerge.checkpoints import working_dtype
from emomerge.checkpoints.factors import Term
from emomerge.errors import BadInput
from emomerge.numerics.threads import one_thread

Index: TypeAlias = slice | Tensor
"""Output rows: a slice, or a permutation as a tensor of int64."""


class Formula(ABC):
    """The change of one parameter W of shape (out, in, *kernel), or (out,): W′ at strength 1.

    All arithmetic is float32, or float64 where W is, on one thread, so that the bits do not depend on the number of threads;
    the caller rounds once.
    """

    additive: bool = True
    """Whether W′ − W does not depend on W."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Output rows of the parameter that the adapter was trained on; None if any number fits."""

    @abstractmethod
    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Raise BadInput unless the formula fits a parameter of this shape."""

    @abstractmethod
    def _changed(self, weight: Tensor) -> Tensor:
        """Return W′ in the dtype of `weight`."""

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return W + s(W′ − W), unrounded: in float32, or float64 where W is. W itself stays as it is.

        Args:
            weight: W, in any floating-point dtype.
            strength: s. With 0, the result is W whatever the formula.
        """
        weight = weight.to(working_dtype(weight.dtype))
        with one_thread():
            if self.additive:
                return torch.add(weight, self._delta(tuple(weight.shape), weight.dtype), alpha=strength)
            changed = self._changed(weight)
            return changed if strength == 1 else torch.lerp(weight, changed, strength)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return ΔW = W′ − W of an additive formula, in `shape`. A dtype narrower than float32 would lose accuracy."""
        with one_thread():
            return self._delta(shape, dtype)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not additive")

    def take(self, index: Index) -> Formula | None:
        """Return the formula of some output rows; None if each row depends on all rows of W."""
        return None

    def term(self) -> Term | None:
        """Return ΔW as a product of two matrices in float32, with the bits of `delta`; None if it is none."""
        return None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return A (r, columns) and B (out, r) with ΔW = BA for W as a matrix, or None if the formula is not of low rank."""
        return None


class Additive(Formula):
    """A formula with W′ = W + ΔW."""

    def _changed(self, weight: Tensor) -> Tensor:
        return weight + self._delta(tuple(weight.shape), weight.dtype)

    def take(self, index: Index) -> Formula | None:
        """Return the formula of some output rows."""
        return _Rows(self, index)


@dataclass(frozen=True)
class _Rows(Additive):
    """Some output rows of an additive formula."""

    whole: Additive
    index: Index

    @property
    def rows(self) -> int:
        return len(range(self.whole.rows or 0)[self.index]) if isinstance(self.index, slice) else len(self.index)

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        require_shape(shape[:1], (self.rows,), where=where)
        self.whole.check(self._whole(shape), where=where)

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.whole.rows is not None
        return (self.whole.rows, *shape[1:])

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.whole._delta(self._whole(shape), dtype)[self.index]


@dataclass(frozen=True)
class Difference(Additive):
    """ΔW itself, as `diff`, `diff_b`, `w_norm` and `b_norm` store it."""

    value: Tensor

    @property
    def rows(self) -> int:
        """Its own."""
        return self.value.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept its own shape; the kernel of a 1×1 convolution may be missing, or be there in excess."""
        require_like(shape, tuple(self.value.shape), where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype).reshape(shape)

    def take(self, index: Index) -> Formula:
        """Return some rows of ΔW."""
        return Difference(self.value[index])


@dataclass(frozen=True)
class Replacement(Formula):
    """W′ itself, as `set_weight` stores it."""

    value: Tensor
    additive = False

    @property
    def rows(self) -> int:
        """Its own."""
        return self.value.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept its own shape; the kernel of a 1×1 convolution may be missing, or be there in excess."""
        require_like(shape, tuple(self.value.shape), where=where)

    def _changed(self, weight: Tensor) -> Tensor:
        return self.value.to(weight).reshape(weight.shape)

    def take(self, index: Index) -> Formula:
        """Return some rows of W′."""
        return Replacement(self.value[index])


def require_shape(found: tuple[int, ...], expected: tuple[int, ...], *, where: object) -> None:
    """Raise BadInput if the base has another shape than the adapter was trained on."""
    if tuple(found) != tuple(expected):
        raise BadInput(
            "the base tensor has another shape than the adapter expects",
            where=where,
            expected=tuple(expected),
            found=tuple(found),
            fix="give the base that the adapter was trained on",
        )


def require_like(found: tuple[int, ...], expected: tuple[int, ...], *, where: object) -> None:
    """Raise BadInput if the shapes differ in more than a kernel of 1×1, which makes a linear layer a convolution."""
    if _without_kernel(found) != _without_kernel(expected):
        require_shape(found, expected, where=where)


def require_columns(found: tuple[int, ...], rows: int, columns: tuple[int, ...], *, where: object) -> None:
    """Raise BadInput unless a weight has these rows, and columns of this shape; flattened columns need only their number."""
    if len(columns) == 1 and len(found) > 1:
        require_shape((found[0], math.prod(found[1:])), (rows, *columns), where=where)
    else:
        require_like(found, (rows, *columns), where=where)


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = len(shape)
    while kept > 2 and shape[kept - 1] == 1:
        kept -= 1
    return tuple(shape[:kept])
