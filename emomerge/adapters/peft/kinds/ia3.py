"""IA³ as PEFT stores it: a factor of each output row and of its bias, or of each input channel (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from emomerge.adapters.formulas.formula import Formula, require_shape
from emomerge.adapters.peft.kind import Kind, Module, Settings
from emomerge.adapters.peft.patterns import matches_all


class IA3Settings(Settings):
    """Which modules have factors of their input."""

    feedforward_modules: list[str] | str | None = None


@dataclass(frozen=True)
class Factors(Formula):
    """W′ = l·W along the output rows (axis 0) or the input channels (axis 1).

    Args:
        factor: l, (n,).
        axis: the axis that l belongs to.
    """

    factor: Tensor
    axis: int
    additive = False

    @property
    def rows(self) -> int | None:
        """Any number if l belongs to the input."""
        return len(self.factor) if self.axis == 0 else None

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept a weight whose axis has the length of l, or of one of the groups of a grouped convolution."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        groups = len(self.factor) // size if size and self.axis == 1 and len(shape) > 2 else 1
        if groups < 1 or shape[0] % groups:
            groups = 1
        require_shape((size * groups,), tuple(self.factor.shape), where=f"{where}, axis {self.axis} of {tuple(shape)}")

    def _changed(self, weight: Tensor) -> Tensor:
        factor = self.factor.to(weight)
        tail = [1] * (weight.ndim - 2)
        if self.axis == 0:
            return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        groups = len(factor) // weight.shape[1]  # of a convolution, each with its own channels
        grouped = weight.unflatten(0, (groups, -1)) * factor.reshape(groups, 1, -1, *tail)
        changed: Tensor = grouped.flatten(0, 1)
        return changed


def _ia3(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 4, 5)
    factor = module.take("ia3_l")
    if len(module.shape) == 2:
        axis = int(tuple(factor.shape) == (1, module.shape[1]))
        if tuple(factor.shape) == (1, 1) and module.shape == (1, 1):
            axis = int(_is_feedforward(module))
        module.take("ia3_l", *((1, module.shape[1]) if axis else (module.out, 1)))
    else:
        axis = int(_is_feedforward(module))
        module.take("ia3_l", 1, None, *[1] * (len(module.shape) - 2))
    formulas: dict[str, Formula] = {"weight": Factors(factor.flatten(), axis)}
    if axis == 0:
        formulas["bias"] = Factors(factor.flatten(), 0)
    return formulas


def _is_feedforward(module: Module) -> bool:
    """Return whether the factors belong to the input, by PEFT's rule."""
    named = module.setting("feedforward_modules", [])
    if isinstance(named, str):
        return matches_all(named, module.name, where=f"{module.where}, feedforward_modules")
    return any(module.name.endswith(name) for name in named)


IA3 = Kind("IA³", ("ia3_l",), _ia3, IA3Settings, frozenset({"init_ia3_weights"}), conv1d=True)
