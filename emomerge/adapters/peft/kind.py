"""What a type of PEFT adapter consists of: its tensors, its settings and the formulas that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula
from emomerge.adapters.peft.patterns import matches_end
from emomerge.errors import BadInput

Count = Annotated[int, Field(gt=0, lt=2**31)]
Number = Annotated[float, Field(ge=0, lt=1e30, allow_inf_nan=False)]
Shape = tuple[int, ...]

TRAINING_ONLY = frozenset(
    """
    auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type
    """.split()  # noqa: SIM905
)
"""Fields of every configuration that the names and values of the tensors make redundant, or that only matter in training."""


class Settings(BaseModel):
    """The types of the fields that are read; a type of adapter adds its own."""

    peft_type: str
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None


@dataclass
class Module:
    """The tensors of an adapter that belong to one module of the model.

    Args:
        name: of the module in the live model.
        tensors: by the names that PEFT gives them.
        config: the content of the configuration file.
        shape: of the weight as its layer computes with it: (out, in, *kernel); for an embedding (tokens, features).
        where: the file and the module, for messages.
        shared: tensors that all modules of the adapter share.
        largest: the largest (out, in) among all modules of the adapter.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    shape: Shape
    where: str
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    largest: tuple[int, int] = (0, 0)

    def has(self, name: str) -> bool:
        """Return whether a tensor is there."""
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor. Raises BadInput if it is missing or of another shape, in which None stands for any number."""
        if name not in self.tensors:
            raise BadInput("a tensor of the adapter is missing", where=self.where, expected=name, found=sorted(self.tensors))
        tensor = self.tensors[name]
        if shape:
            self._require(name, tensor, shape)
        return tensor

    def take_shared(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor that all modules share; see `take`."""
        if name not in self.shared:
            raise BadInput("a tensor of the adapter is missing", where=self.where, expected=name, found=sorted(self.shared))
        self._require(name, self.shared[name], shape)
        return self.shared[name]

    def _require(self, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(want is not None and want != size for want, size in zip(shape, found, strict=True)):
            expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
            raise BadInput(
                "an adapter tensor has the wrong shape", where=f"{self.where}, {name}", expected=expected, found=found
            )

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a field of the configuration; `default` if it is missing or null."""
        value = self.config.get(name)
        return default if value is None else value

    def pattern(self, patterns: str, default: str, fallback: Any) -> Any:
        """Return the value of the first pattern that matches the module's name or its end (`peft.utils.get_pattern_key`)."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if matches_end(pattern, self.name, where=f"{self.where}, {patterns}"):
                return value
        return self.setting(default, fallback)

    @property
    def out(self) -> int:
        """Output rows."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: input channels times the kernel."""
        return math.prod(self.shape[1:])

    def require_dimensions(self, *dimensions: int) -> None:
        """Raise BadInput if the layer is of a kind for which PEFT has no such adapter."""
        if len(self.shape) not in dimensions:
            expected = " or ".join(map(str, dimensions))
            raise BadInput(
                "an adapter of this type cannot belong to this tensor of the base", where=self.where,
                expected=f"{expected} dimensions", found=self.shape, fix="give the base that the adapter was trained on",
            )  # fmt: skip

    def require_rank(self, found: int, expected: int, name: str) -> None:
        """Raise BadInput if a factor has another rank than the configuration says."""
        if found != expected:
            raise BadInput(
                "a factor has another rank than the adapter's configuration says",
                where=f"{self.where}, {name}", expected=expected, found=found,
            )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A type of adapter.

    Args:
        name: as its users call it.
        tensors: names of the tensors of a module.
        read: returns the formulas of a module by the parameter that they change, "weight" or "bias".
        settings: the types of the fields of the configuration that `read` uses.
        training: further fields that only matter in training.
        shared: names of tensors that all modules share.
        embedding: names of those tensors that belong to an embedding.
        conv1d: whether the layer may be a Conv1D, which stores the transpose of its weight, as in GPT-2.
    """

    name: str
    tensors: tuple[str, ...]
    read: Callable[[Module], Mapping[str, Formula]]
    settings: type[Settings] = Settings
    training: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    conv1d: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """Fields of the configuration that are read or do not matter. Any other field that is set changes the formula."""
        return TRAINING_ONLY | frozenset(self.settings.model_fields) | self.training
