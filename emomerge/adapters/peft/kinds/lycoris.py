"""LoHa and LoKr as PEFT stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Formula, require_shape
from emomerge.adapters.formulas.products import Hadamard, Kronecker, Matrix
from emomerge.adapters.peft.kind import Count, Kind, Module, Number, Settings
from emomerge.errors import BadInput

_TRAINING = frozenset({"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"})


class LycorisSettings(Settings):
    """Rank and α, which patterns can set for single modules."""

    r: Count
    alpha: Annotated[Number, Field(gt=0)]
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Number] | None = None


def _scale(module: Module, rank: int | None) -> float:
    """Return α/r. Raises BadInput if the factors have another rank than the configuration says."""
    r = int(module.pattern("rank_pattern", "r", 8))
    if rank is not None:
        module.require_rank(rank, r, "the factors")
    return float(module.pattern("alpha_pattern", "alpha", 8)) / r


def _product(module: Module, name: str, core: str) -> Matrix:
    """Return the matrix that two factors, and for the kernel of a convolution a core, stand for."""
    if not module.has(core):
        b = module.take(f"{name}_b", None, None)
        return Matrix(module.take(f"{name}_a", None, len(b)), b)
    value = module.take(core, None, None, None, None)
    return Matrix(module.take(f"{name}_a", len(value), None), module.take(f"{name}_b", value.shape[1], None), value)


def _loha(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 3, 4)
    first, second = _product(module, "hada_w1", "hada_t1"), _product(module, "hada_w2", "hada_t2")
    if first.shape != second.shape:
        raise BadInput("the two matrices differ in shape", where=module.where, found=f"{first.shape} and {second.shape}")
    module.require_rank(second.rank or 0, first.rank or 0, "hada_w2_b")
    return {"weight": Hadamard(first, second, _scale(module, first.rank))}


LOHA = Kind(
    "LoHa",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    _loha,
    LycorisSettings,
    _TRAINING,
)


@dataclass(frozen=True)
class _KroneckerOfLine(Additive):
    """ΔW of a one-dimensional convolution whose second matrix is stored whole.

    PEFT multiplies M₁ (a, c) with M₂ (b, d, kernel) by `torch.kron`, which takes a missing axis of M₁ to be the first, and
    gives the (b, ad, ck) numbers the shape (ab, cd, kernel) of the weight. This is not M₁⊗M₂, but it is what the model was
    trained with, and what its forward pass adds.
    """

    first: Tensor
    second: Tensor
    scale: float

    @property
    def rows(self) -> int:
        """The product of the rows."""
        return self.first.shape[0] * self.second.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept the product of the shapes."""
        require_shape(shape, (self.rows, self.first.shape[1] * self.second.shape[1], self.second.shape[2]), where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        first = self.first.to(dtype) * self.scale
        return torch.einsum("ac,bdk->badck", first, self.second.to(dtype)).reshape(shape)


def _lokr(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 3, 4)
    first = Matrix(module.take("lokr_w1", None, None)) if module.has("lokr_w1") else _product(module, "lokr_w1", "")
    second = Matrix(module.take("lokr_w2")) if module.has("lokr_w2") else _product(module, "lokr_w2", "lokr_t2")
    if not 2 <= len(second.shape) <= 4:
        raise BadInput("an adapter tensor has the wrong shape", where=f"{module.where}, lokr_w2", found=second.shape)
    for name in ("lokr_w1", "lokr_w2"):
        if module.has(name) and (module.has(f"{name}_a") or module.has(f"{name}_b")):
            raise BadInput("a matrix is there whole and as a product", where=f"{module.where}, {name}")
    scale, _ = (_scale(module, matrix.rank) for matrix in (first, second))
    if second.b is None and len(second.shape) == 3:
        return {"weight": _KroneckerOfLine(first.value(torch.float64), second.a, scale)}
    return {"weight": Kronecker(first, second, scale)}


LOKR = Kind(
    "LoKr",
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    _lokr,
    LycorisSettings,
    _TRAINING | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
)
