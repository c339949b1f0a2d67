"""OFT and BOFT: orthogonal maps of the output rows (Qiu et al. 2023; Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, require_shape


@dataclass(frozen=True)
class Rotated(Formula):
    """W′ = m·RᵀW for each group of consecutive rows; R is block-diagonal.

    Args:
        groups: unconstrained blocks (number, size, size) of each group; several where one adapter covers fused layers.
        constraint: κ; the norm of Q of a group with n rows is at most κn. 0 means no limit.
        rescale: m, (rows,), or None.
    """

    groups: tuple[Tensor, ...]
    constraint: float
    rescale: Tensor | None
    additive = False

    @property
    def rows(self) -> int:
        """All rows of all blocks."""
        return sum(len(blocks) * blocks.shape[-1] for blocks in self.groups)

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight with the same number of rows."""
        require_shape(tuple(shape[:1]), (self.rows,), where=where)

    def _changed(self, weight: Tensor) -> Tensor:
        parts = weight.flatten(1).split([len(blocks) * blocks.shape[-1] for blocks in self.groups])
        turned = [
            (orthogonal(blocks.to(weight), self.constraint * len(part)).mT @ part.unflatten(0, blocks.shape[:2])).flatten(0, 1)
            for blocks, part in zip(self.groups, parts, strict=True)
        ]
        return rescaled(torch.cat(turned), self.rescale).reshape(weight.shape)


@dataclass(frozen=True)
class Butterfly(Formula):
    """W′ = m·B_k⋯B₁W; each B is block-diagonal after a permutation of the rows.

    Args:
        blocks: unconstrained blocks (k, number, size, size).
        constraint: κ; the norm of all Q together is at most κn for n rows. 0 means no limit.
        rescale: m, (rows,), or None.
    """

    blocks: Tensor
    constraint: float
    rescale: Tensor | None
    additive = False

    @property
    def rows(self) -> int:
        """Rows of all blocks of one factor."""
        return self.blocks.shape[1] * self.blocks.shape[2]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight with the same number of rows."""
        require_shape(tuple(shape[:1]), (self.rows,), where=where)

    def _changed(self, weight: Tensor) -> Tensor:
        rows, size = weight.flatten(1), self.blocks.shape[-1]
        factors = orthogonal(self.blocks.to(weight), self.constraint * self.rows)
        for level, factor in enumerate(factors):
            distance = 2**level * (size // 2)  # rows in 2 × distance are interleaved, so that a block mixes distant ones
            rows = rows.unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 2)
            rows = (factor @ rows.unflatten(0, (-1, size))).flatten(0, 1)
            rows = rows.unflatten(0, (-1, distance, 2)).transpose(1, 2).flatten(0, 2)
        return rescaled(rows, self.rescale).reshape(weight.shape)


def orthogonal(blocks: Tensor, limit: float) -> Tensor:
    """Return (I + Q)(I − Q)⁻¹ of each block, with Q = B − Bᵀ scaled down to the norm `limit`, unless that is 0."""
    skew = blocks - blocks.mT
    if limit > 0:
        norm = float(torch.linalg.vector_norm(skew))
        if norm > limit:
            skew = skew * (limit / norm)
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turned: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return turned


def rescaled(rows: Tensor, factor: Tensor | None) -> Tensor:
    """Return the rows times their factors."""
    return rows if factor is None else rows * factor.to(rows)[:, None]
