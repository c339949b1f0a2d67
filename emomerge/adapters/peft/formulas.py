"""Types of adapters whose effect on each weight is an explicit formula; see the table in `types`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.formulas.formula import Formula
from emomerge.adapters.peft.adapter import PeftReader, Shape, without_wrappers
from emomerge.adapters.peft.kind import Kind, Module
from emomerge.checkpoints import Checkpoint, Piece, working_dtype
from emomerge.errors import BadInput

Targets = Sequence[tuple[str, Piece | None]]


class FormulaReader(PeftReader):
    """Reads an adapter of one kind."""

    def __init__(self, folder: Path, config: Mapping[str, Any], base: Checkpoint, allow_unmatched: bool, kind: Kind) -> None:
        super().__init__(folder, config, base, allow_unmatched)
        self.kind = kind
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        self.shared: dict[str, str] = {}
        names = "|".join(map(re.escape, kind.tensors))
        self._own = re.compile(rf"(.+)\.({names})(?:\.default)?(?:\.weight)?")
        self._shared = (
            re.compile(rf"base_model\.({'|'.join(map(re.escape, kind.shared))})(?:\.default)?") if kind.shared else None
        )

    def claim(self, name: str, key: str) -> bool:
        """Take the tensors of the kind. Raises BadInput for those of another."""
        if self._shared is not None and (match := self._shared.fullmatch(key)):
            self.shared[match[1]] = key
        elif match := self._own.fullmatch(name):
            module = without_wrappers(match[1])
            if (other := self.modules[module].setdefault(match[2], key)) != key:
                raise BadInput("one tensor has two spellings", where=f"{self.file}, {key}", found=f"also {other}")
        elif match := _FOREIGN.search(name):
            raise BadInput(f"a tensor that does not belong to {self.kind.name}", where=f"{self.file}, {key}", found=match[1])
        else:
            return False
        return True

    def add_modules(self) -> None:
        """Add the change of every module."""
        places = {name: self._place(name) for name in sorted(self.modules)}
        found = {name: place for name, place in places.items() if place is not None}
        shapes = [self._oriented(name, place.shape, transposed=place.orientations[0]) for name, place in found.items()]
        pairs = [(shape[0], shape[1]) for shape in shapes if len(shape) > 1]
        largest = (max((out for out, _ in pairs), default=0), max((features for _, features in pairs), default=0))
        for name, place in found.items():
            self._add_module(name, place, largest)

    @cached_property
    def _shared_tensors(self) -> dict[str, Tensor]:
        return {part: self.tensors[key] for part, key in self.shared.items()}

    def _place(self, name: str) -> _Place | None:
        key = next(iter(self.modules[name].values()))
        tensor = f"{name}.weight"
        self.refuse_tied(tensor, key)
        targets = self.targets(tensor, key)
        if not targets:
            return None
        shape = self.shape(targets[0][0], tensor, targets[0][1])
        known = self.is_conv1d(name) if len(shape) == 2 and self.kind.conv1d else False
        if known is None and shape[0] == shape[1]:
            known = bool(self.config.get("fan_in_fan_out"))
        flag = bool(self.config.get("fan_in_fan_out"))
        return _Place(key, targets, shape, (flag, not flag) if known is None else (known,))

    def _oriented(self, name: str, shape: Shape, *, transposed: bool) -> Shape:
        """Return the shape of a weight as its layer computes with it."""
        embedding = any(tensor in self.modules[name] for tensor in self.kind.embedding)
        return shape[::-1] if transposed and not embedding else shape

    def _add_module(self, name: str, place: _Place, largest: tuple[int, int]) -> None:
        formulas, transposed = self._formulas(name, place, largest)
        for parameter, formula in formulas.items():
            if parameter == "weight":
                targets, shape = place.targets, place.shape
            elif self.names.holds(f"{name}.{parameter}"):
                targets = self.targets(f"{name}.{parameter}", place.key)
                shape = self.shape(targets[0][0], f"{name}.{parameter}", targets[0][1])
                formula.check(shape, where=f"{self.file}, {place.key}")
            else:
                continue
            for target, piece in targets:
                change = self._change(formula, targets, shape, piece, transposed=transposed and parameter == "weight")
                self.add(target, place.key, change)

    def _formulas(self, name: str, place: _Place, largest: tuple[int, int]) -> tuple[Mapping[str, Formula], bool]:
        """Return the formulas of a module, and whether the base stores its weight transposed."""
        first: BadInput | None = None
        for transposed in place.orientations:
            shape = self._oriented(name, place.shape, transposed=transposed)
            where = f"{self.file}, {name}"
            tensors = {part: self.tensors[key] for part, key in self.modules[name].items() if part not in self.shared}
            try:
                formulas = self.kind.read(Module(name, tensors, self.config, shape, where, self._shared_tensors, largest))
                if "weight" in formulas:
                    formulas["weight"].check(shape, where=where)
            except BadInput as error:
                first = first or error
                continue
            return formulas, transposed
        assert first is not None
        raise first

    def _change(self, formula: Formula, targets: Targets, shape: Shape, piece: Piece | None, *, transposed: bool) -> Change:
        """Return the change of one base tensor by a formula of the whole weight."""
        if formula.additive:
            return Change(delta=partial(_delta, formula, shape, piece, transposed))
        if piece is None:
            return Change(replace=partial(_replaced, formula, transposed))
        parts = [(name, part) for name, part in targets if part is not None]
        return Change(replace=partial(_part_replaced, formula, transposed, shape, parts, piece, self.base))


class _Place(NamedTuple):
    """Where the base holds the weight of a module."""

    key: str
    """A key of the module in the adapter, for messages."""
    targets: Targets
    shape: Shape
    orientations: tuple[bool, ...]
    """Whether the base stores it transposed; both where the model is unknown, the likelier first."""


_FOREIGN = re.compile(
    r"\.((?:lora_|hada_|lokr_|ia3_|oft_|boft_|hra_|vera_|randlora_|fourierft_|miss_|bone_|trainable_tokens_original)\w*)(?:\.|$)"
)
"""Names that PEFT gives to the tensors of adapters."""


def _delta(formula: Formula, shape: Shape, piece: Piece | None, transposed: bool, dtype: torch.dtype) -> Tensor:
    delta = formula.delta(shape[::-1], dtype).T if transposed else formula.delta(shape, dtype)
    return delta if piece is None else piece.of(delta)


def _replaced(formula: Formula, transposed: bool, base: Tensor) -> Tensor:
    return formula.apply(base.T).T if transposed else formula.apply(base)


def _part_replaced(
    formula: Formula,
    transposed: bool,
    shape: Shape,
    parts: Sequence[tuple[str, Piece]],
    piece: Piece,
    base: Checkpoint,
    _: Tensor,
) -> Tensor:
    """Return the part of a weight that a base tensor holds, of a formula that needs all of it."""
    whole = torch.empty(shape, dtype=working_dtype(base.info(parts[0][0]).dtype))
    for name, part in parts:
        part.of(whole).copy_(base[name])
    return piece.of(_replaced(formula, transposed, whole))
