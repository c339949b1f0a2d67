"""Low-rank changes of a matrix, shared by the formats that store factors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emomerge.checkpoints.factors import Factors, Term

Kind = Literal["linear", "conv1d", "embedding"]


class Target(NamedTuple):
    """The module of a live model whose weight a pair of factors changes."""

    module: str
    kind: Kind


class LowRank(NamedTuple):
    """A change Δ = BA of one matrix, in the layout of the base tensor.

    Args:
        a: A (r, columns).
        b: B (rows, r).
    """

    target: Target
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)


def product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return s·BA in `dtype`.  A (r, in), B (out, r) → (out, in).

    In float32 its bits are the same on every machine and for any number of threads (see `Factors`).
    """
    if dtype == torch.float32 and a.is_cpu and b.is_cpu:
        return Factors((len(b), a.shape[1]), (Term(a, b, scale),)).dense()
    return torch.addmm(b.new_zeros((), dtype=dtype), b.to(dtype), a.to(dtype), beta=0, alpha=scale)
