"""OFT and BOFT as PEFT stores them: rotations of the input of a layer (Qiu et al. 2023; Liu et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, require_shape
from emomerge.adapters.peft.kind import Count, Kind, Module, Settings
from emomerge.errors import BadInput


class OftSettings(Settings):
    """How the stored numbers become rotations."""

    oft_block_size: int
    """Files from PEFT before 0.14, which lack it, hold another parametrization."""
    r: int | None = None
    coft: bool | None = None
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    block_share: bool | None = None
    use_cayley_neumann: bool | None = None
    num_cayley_neumann_terms: Annotated[int, Field(ge=0, le=1000)] | None = None


@dataclass(frozen=True)
class InputRotation(Formula):
    """W′ = WRᵀ, or WR of an embedding; R is block-diagonal over the columns.

    Args:
        packed: the upper triangles of skew-symmetric matrices Q, row by row: (blocks, size·(size−1)/2).
        size: of a block.
        columns: of the weight as a matrix; one stored block serves for all if there is only one.
        limit: the largest norm of each Q (COFT), or None.
        terms: of the Cayley–Neumann series; None for R = (I − Q)(I + Q)⁻¹ itself.
        embedding: whether the rows of W are vectors that R acts on from the right.
    """

    packed: Tensor
    size: int
    columns: int
    limit: float | None
    terms: int | None
    embedding: bool = False
    additive = False

    @property
    def rows(self) -> None:
        """Any number."""
        return None

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight with the same number of columns."""
        require_shape((math.prod(shape[1:]),), (self.columns,), where=f"{where}, columns")

    def _changed(self, weight: Tensor) -> Tensor:
        rotations = self._rotations(weight.dtype)
        blocks = weight.flatten(1).unflatten(1, (-1, self.size))
        turn = "orc,rck->ork" if self.embedding else "orc,rkc->ork"
        return torch.einsum(turn, blocks, rotations.expand(blocks.shape[1], -1, -1)).reshape(weight.shape)

    def _rotations(self, dtype: torch.dtype) -> Tensor:
        skew = torch.zeros(len(self.packed), self.size, self.size, dtype=dtype)
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        skew[:, rows, columns] = self.packed.to(dtype)
        skew = skew - skew.mT
        if self.limit is not None:
            norms = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = torch.where(norms <= self.limit, skew, skew * (self.limit / norms.clamp(min=torch.finfo(dtype).tiny)))
        identity = torch.eye(self.size, dtype=dtype).expand_as(skew)
        if self.terms is None:
            exact: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
            return exact
        return _series(identity, skew, self.terms)


def _series(identity: Tensor, skew: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + 2Q² + … + Qᵏ, k = max(terms − 1, 3), as PEFT sums it: with one or two terms I or I + 2Q."""
    total = identity.clone()
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def _oft(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 4)
    embedding = module.has("oft_embedding_R")
    name = "oft_embedding_R" if embedding else "oft_R"
    if len(module.shape) == 4 and module.shape[2:] != (1, 1):
        raise BadInput(
            "OFT of a convolution with a kernel cannot be baked", where=module.where,
            found="PEFT adds up the rotated patches of its input, which no kernel does",
            fix="train it again without this layer in target_modules, or with BOFT",
        )  # fmt: skip
    packed = module.take(name, None, None)
    size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    columns = module.columns
    share = bool(module.setting("block_share", False))
    expected = 1 if share else columns // size
    if size * (size - 1) // 2 != packed.shape[1] or columns % size or len(packed) != expected:
        raise BadInput(
            "an adapter tensor has the wrong shape", where=f"{module.where}, {name}", found=tuple(packed.shape),
            expected=f"blocks that make up {columns} columns", fix="give the base that the adapter was trained on",
        )  # fmt: skip
    limit = float(module.setting("eps", 6e-5)) / math.sqrt(len(packed)) if module.setting("coft", False) else None
    terms = module.setting("num_cayley_neumann_terms", 5) if module.setting("use_cayley_neumann", True) else None
    return {"weight": InputRotation(packed, size, columns, limit, terms, embedding)}


OFT = Kind(
    "OFT", ("oft_R", "oft_embedding_R"), _oft, OftSettings, frozenset({"module_dropout", "init_weights"}),
    embedding=("oft_embedding_R",),
)  # fmt: skip


class BoftSettings(Settings):
    """The sizes of the blocks, which the tensors also show."""

    boft_block_size: int | None = None
    boft_block_num: int | None = None
    boft_n_butterfly_factor: Count | None = None


@dataclass(frozen=True)
class InputButterfly(Formula):
    """W′ = s·(B_k⋯B₁Wᵀ)ᵀ by output row; each B is block-diagonal after a permutation of the columns of W.

    Args:
        blocks: unconstrained blocks (k, number, size, size).
        scale: s, (rows,).
    """

    blocks: Tensor
    scale: Tensor
    additive = False

    @property
    def rows(self) -> int:
        """The factors of the rows."""
        return len(self.scale)

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight with these rows, and as many columns as all blocks."""
        columns = self.blocks.shape[1] * self.blocks.shape[2]
        require_shape((shape[0], math.prod(shape[1:])), (self.rows, columns), where=where)

    def _changed(self, weight: Tensor) -> Tensor:
        blocks = self.blocks.to(weight)
        skew = (blocks - blocks.mT) / 2
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
        rotations = torch.linalg.solve(identity + skew, identity - skew, left=False)
        columns = weight.flatten(1).T
        for level, rotation in enumerate(rotations):
            order = _interleaved(len(columns), self.blocks.shape[2], level)
            turned = (rotation @ columns[order.argsort()].unflatten(0, rotation.shape[:2])).flatten(0, 1)
            columns = turned[order]
        return (columns.T * self.scale.to(weight)[:, None]).reshape(weight.shape)


def _interleaved(columns: int, size: int, level: int) -> Tensor:
    """Return P of a level: among 2ˡ⁺¹ half blocks in a row, those of even number come first."""
    if not level:
        return torch.arange(columns)
    halves = torch.arange(columns).unflatten(0, (-1, 2**level, 2, size // 2))
    order: Tensor = halves.transpose(1, 2).flatten()
    return order


def _boft(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 4)
    blocks = module.take("boft_R", None, None, None, None)
    levels, number, size, _ = blocks.shape
    module.take("boft_R", levels, number, size, size)
    if not levels or (levels > 1 and (size % 2 or number % 2 ** (levels - 1))):
        raise BadInput("an adapter tensor has the wrong shape", where=f"{module.where}, boft_R", found=tuple(blocks.shape))
    scale = module.take("boft_s", module.out, 1) if len(module.shape) == 2 else module.take("boft_s", None, None)
    if scale.numel() != module.out:
        module.take("boft_s", 1, module.out)
    return {"weight": InputButterfly(blocks, scale.flatten())}


BOFT = Kind("BOFT", ("boft_R", "boft_s"), _boft, BoftSettings, frozenset({"boft_dropout", "init_weights"}))
