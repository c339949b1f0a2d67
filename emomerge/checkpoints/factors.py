"""Changes of a matrix that are stored as products of two factors, multiplied out block by block where they are used."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge import native
from emomerge.numerics.threads import one_thread

KERNELS = Path(__file__).with_name("rounding.c")
PIECE = 2**17
"""Number of elements summed in one double (see native.h), the smallest part for a thread."""


def compiled() -> bool:
    """Return whether factors are multiplied out by compiled code."""
    return native.library(KERNELS) is not None


class Term(NamedTuple):
    """strength · (scale · BA) in some rows of a matrix.

    Args:
        a: A (r, columns).
        b: B (rows, r).
        scale: s.
        start: the first of the rows.
        strength: a further factor.
    """

    a: Tensor
    b: Tensor
    scale: float
    start: int = 0
    strength: float = 1.0


class _Term(ctypes.Structure):
    """`struct term` of native.h."""

    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("start", ctypes.c_long), ("rows", ctypes.c_long),
        ("rank", ctypes.c_long), ("scale", ctypes.c_float), ("strength", ctypes.c_float),
    ]  # fmt: skip


class _Factors(ctypes.Structure):
    """`struct factors` of native.h."""

    _fields_ = [("terms", ctypes.c_void_p), ("count", ctypes.c_long), ("columns", ctypes.c_long)]


@dataclass(frozen=True)
class Factors:
    """A sum of products of two factors, in float32. All ways to multiply it out give the same bits.

    An element is Σ_k b_k·a_k in the order of k, each product rounded before it is added. Terms are added in their order.

    Args:
        shape: of the tensor; the columns of the matrix are all its dimensions but the first.
        terms: the products.
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...]

    @property
    def columns(self) -> int:
        """Number of columns of the matrix."""
        return torch.Size(self.shape[1:]).numel()

    def times(self, strength: float) -> Factors:
        """Return the factors of a multiple."""
        terms = (term._replace(strength=term.strength * strength) for term in self.terms)
        return self if strength == 1 else replace(self, terms=tuple(terms))

    def prepared(self) -> Prepared:
        """Return the factors as compiled code takes them."""
        return Prepared(self)

    def dense(self) -> Tensor:
        """Return the matrix, in the shape of the tensor."""
        numel = torch.Size(self.shape).numel()
        library = native.library(KERNELS)
        if library is None or not numel:
            return self._by_torch()
        out, prepared = torch.empty(self.shape), self.prepared()

        def work(part: tuple[int, int]) -> None:
            library.multiply(prepared.pointer, ctypes.c_void_p(out.data_ptr()), *map(ctypes.c_long, part))

        native.in_parallel(work, native.ranges(numel, PIECE))
        return out

    def _by_torch(self) -> Tensor:
        """Return the matrix by torch's operations, some rows at a time so that they stay in the cache."""
        total = torch.zeros(self.shape[0], self.columns)
        height = max(1, PIECE // max(1, self.columns))
        for term in self.terms:
            rows = total[term.start : term.start + len(term.b)]
            a, b = term.a.float(), term.b.float()
            for some, factor in zip(rows.split(height), b.split(height), strict=True):
                sums, product = torch.zeros_like(some), torch.empty_like(some)
                for k in range(len(a)):
                    sums += torch.mul(factor[:, k : k + 1], a[k], out=product)
                some += sums.mul_(term.scale).mul_(term.strength)
        return total.reshape(self.shape)


class Prepared:
    """Factors in the layout of native.h; the memory lasts as long as this object."""

    def __init__(self, factors: Factors) -> None:
        self._kept: list[Tensor] = []
        terms = [self._term(term) for term in factors.terms]
        self._terms = (_Term * len(terms))(*terms)
        self._factors = _Factors(ctypes.addressof(self._terms), len(terms), factors.columns)
        self.address = ctypes.addressof(self._factors)
        """Address of `struct factors`."""

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The address, to be passed to compiled code."""
        return ctypes.c_void_p(self.address)

    def _term(self, term: Term) -> _Term:
        with one_thread():  # small tensors: a second thread would spend more time waiting for work than working
            a, b = term.a.float().contiguous(), term.b.float().contiguous()
        self._kept += [a, b]
        return _Term(a.data_ptr(), b.data_ptr(), term.start, len(b), len(a), term.scale, term.strength)


def summed(shape: tuple[int, ...], parts: Sequence[Factors]) -> Factors:
    """Return the factors of a sum, in its order."""
    return Factors(shape, tuple(term for part in parts for term in part.terms))
