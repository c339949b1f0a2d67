"""HRA: a chain of Householder reflections of the input (Yuan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, require_shape
from emomerge.adapters.peft.kind import Count, Kind, Module, Settings
from emomerge.errors import BadInput


class HraSettings(Settings):
    """The number of reflections, and whether their directions are made orthogonal first."""

    r: Count
    apply_GS: bool | None = None


@dataclass(frozen=True)
class Reflections(Formula):
    """W′ = W(I − 2u₁u₁ᵀ)⋯(I − 2u_ru_rᵀ) with the columns u of a matrix, each of length 1.

    Args:
        directions: (columns, r).
        orthogonal: whether Gram–Schmidt makes the columns orthogonal.
    """

    directions: Tensor
    orthogonal: bool
    additive = False

    @property
    def rows(self) -> None:
        """Any number."""
        return None

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight with the same number of columns."""
        require_shape((math.prod(shape[1:]),), (len(self.directions),), where=f"{where}, columns")

    def _changed(self, weight: Tensor) -> Tensor:
        changed = weight.flatten(1).clone()
        earlier: list[Tensor] = []
        for column in self.directions.to(weight).T:
            direction = column
            if self.orthogonal:
                for other in earlier:
                    direction = direction - (other @ direction) * other
            direction = direction / torch.linalg.vector_norm(direction)
            earlier.append(direction)
            changed.addr_(changed @ direction, direction, alpha=-2)
        return changed.reshape(weight.shape)


def _hra(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 4)
    directions = module.take("hra_u", module.columns, None)
    module.require_rank(directions.shape[1], module.setting("r"), "hra_u")
    if not bool(directions.any(0).all()):
        raise BadInput("a reflection without a direction", where=f"{module.where}, hra_u", found="a column of zeros")
    return {"weight": Reflections(directions, bool(module.setting("apply_GS", False)))}


HRA = Kind("HRA", ("hra_u",), _hra, HraSettings, frozenset({"init_weights"}))
