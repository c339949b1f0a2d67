"""One PEFT adapter over one base: which tensor of the base each key changes, and tensors that only replace others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.naming import BaseNames
from emomerge.adapters.peft.files import CONFIG, PICKLE, PREFIX, WEIGHTS
from emomerge.checkpoints import Checkpoint, Piece, all_finite, open_checkpoint
from emomerge.checkpoints.names import MAYBE_TIED
from emomerge.errors import BadInput, Note

_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_WRAPPERS = ("base_layer", "modules_to_save", "original_module", "ln_tuning_layers")
Shape = tuple[int, ...]


class PeftReader:
    """Reads an adapter; a subclass for each group of types adds what the tensors of a module do.

    Args:
        folder: the adapter.
        config: the content of its configuration, checked.
        base: the model that it was trained on.
        allow_unmatched: skip adapter keys that match no base tensor, with a warning.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], base: Checkpoint, allow_unmatched: bool) -> None:
        self.config = config
        self.file = folder / WEIGHTS
        self.base = base
        self.names = BaseNames(base)
        self.allow_unmatched = allow_unmatched
        self.unmatched: list[str] = []
        self.found: dict[str, Change] = {}
        self._by_formula: set[str] = set()
        self.tensors = open_weights(folder)

    def changes(self) -> dict[str, Change]:
        """Return all changes by base tensor name, sorted."""
        for key in sorted(self.tensors, key=lambda key: "modules_to_save" in key):  # these override a trained bias
            self.check_values(key)
            name = key.removeprefix(PREFIX)
            if self.claim(name, key):
                continue
            if match := _TOKENS.fullmatch(name):
                self.add_token_rows(match[1], key)
            else:
                self._add_replacement(without_wrappers(name), key)
        self.add_modules()
        self._report_unmatched(nothing_matched=not self.found)
        return {name: self.found[name] for name in sorted(self.found)}

    def check_values(self, key: str) -> None:
        """Raise BadInput unless a tensor of the adapter is of finite floating-point numbers."""
        dtype = self.tensors.info(key).dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise BadInput("an adapter tensor of a dtype that cannot be added", where=f"{self.file}, {key}", found=dtype)
        if not all_finite(self.tensors[key]):
            raise BadInput("NaN or infinity in an adapter", where=f"{self.file}, {key}", fix="train it again")

    def claim(self, name: str, key: str) -> bool:
        """Take a tensor of the adapter's own; return False if `key` is not one. `name` is the key without PEFT's prefix."""
        raise NotImplementedError

    def add_modules(self) -> None:
        """Add the changes of all modules whose tensors were claimed."""
        raise NotImplementedError

    def add(self, name: str, key: str, change: Change, *, formula: bool = True) -> None:
        """Add a change of a base tensor to those found before, which replace the tensor; only one may be by a formula."""
        earlier = self.found.get(name, Change())
        if formula and name in self._by_formula:
            raise BadInput("two adapter keys change one base tensor", where=f"{self.file}, {key}", found=name)
        if formula:
            self._by_formula.add(name)
        replace = change.replace or earlier.replace
        if change.replace is not None and earlier.replace is not None:
            replace = partial(_one_after_the_other, earlier.replace, change.replace)
        self.found[name] = Change(replace, change.delta or earlier.delta, change.factors or earlier.factors)

    def _add_replacement(self, tensor: str, key: str) -> None:
        """Add a tensor that replaces one of the base."""
        value = self.tensors[key]
        self.refuse_tied(tensor, key)
        for name, piece in self.targets(tensor, key):
            self.require_shape(name, key, self.shape(name, tensor, piece), tuple(value.shape))
            part = value if piece is None else piece.of(value)
            self.add(name, key, Change(replace=partial(_first, part)), formula=False)

    def add_token_rows(self, module: str, key: str) -> None:
        """Add the rows of an embedding, given by `trainable_token_indices`, that replace those of the base."""
        if self._repeats_tied_rows(module, key):
            return
        name = self.find(f"{module}.weight", key)
        if name is None:
            return
        indices = self.config.get("token_indices") or self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((rows for target, rows in indices.items() if f".{module}".endswith(f".{target}")), None)
        rows = self.tensors[key]
        vocabulary, *features = self.base.info(name).shape
        fits = isinstance(indices, list) and all(type(i) is int and 0 <= i < vocabulary for i in indices)
        if not fits or tuple(rows.shape) != (len(indices or ()), *features):
            raise BadInput(
                "the token rows do not match trainable_token_indices or the base",
                where=f"{self.file}, {key}",
                expected=f"rows of {self.base.info(name).shape} at {indices}",
                found=tuple(rows.shape),
            )

        def replace(base: Tensor) -> Tensor:
            dtype = torch.promote_types(base.dtype, rows.dtype)
            where = torch.tensor(indices, device=base.device)
            return base.to(dtype).index_copy(0, where, rows.to(base.device, dtype))

        self.add(name, key, Change(replace=replace), formula=False)

    def _repeats_tied_rows(self, module: str, key: str) -> bool:
        """Return whether rows are those of the tensor that the base ties to this one, which PEFT saves under both names."""
        tensor = f"{module}.weight"
        if self.names.find(tensor) is not None or self.names.tied_partner(tensor) is None:
            return False
        others = [other for other in self.tensors if other != key and _TOKENS.fullmatch(other.removeprefix(PREFIX))]
        return any(torch.equal(self.tensors[other], self.tensors[key]) for other in others)

    def find(self, tensor: str, key: str) -> str | None:
        """Return the base's name of a module tensor; None, after noting the key as unmatched, if there is none."""
        name = self.names.find(tensor)
        if name is None:
            if self.config.get("ensure_weight_tying") and self.names.tied_partner(tensor):
                return None  # the partner has an entry of its own with the same content
            self.unmatched.append(key)
            return None
        self._refuse_quantized(name)
        return name

    def targets(self, tensor: str, key: str) -> list[tuple[str, Piece | None]]:
        """Return the base tensor of a module tensor, or those that hold its pieces; notes the key if there is none."""
        parts = [] if self.names.find(tensor) is not None else self.names.parts(tensor)
        if not parts:
            return [(name, None)] if (name := self.find(tensor, key)) is not None else []
        for name, _ in parts:
            self._refuse_quantized(name)
        return list(parts)

    def shape(self, name: str, tensor: str, piece: Piece | None) -> Shape:
        """Return the shape of a module tensor that `name` of the base holds, or a piece of it."""
        shape = self.base.info(name).shape
        if piece is None:
            return shape
        self.require_shape(name, name, shape, piece.shape)
        return self.names.shape(tensor) or shape

    def is_conv1d(self, module: str) -> bool | None:
        """Return whether a layer is a Conv1D, which stores (in, out), as in GPT-2; None if the model is unknown."""
        if self.names.without_conv1d:
            return False
        live = self.names.module(module)
        return None if live is None else type(live).__name__ == "Conv1D"

    def require_shape(self, name: str, key: str, found: Shape, wanted: Shape) -> None:
        """Raise BadInput if a base tensor has another shape than the adapter needs."""
        if found != wanted:
            raise BadInput(
                "the base tensor has another shape than the adapter expects",
                where=f"{self.file}, {key}",
                expected=wanted,
                found=f"{found} in {name} of {self.base.source}",
                fix="give the base that the adapter was trained on",
            )

    def refuse_tied(self, tensor: str, key: str) -> None:
        """Refuse to change one of two tied tensors, as a live adapter does: a dense checkpoint has only one tensor for both."""
        if not MAYBE_TIED.search(tensor):  # no need to build the model
            return
        if self.config.get("ensure_weight_tying") or not tensor.endswith((".weight", ".bias")):
            return
        partner = self.names.tied_partner(tensor)
        if partner is not None and (self.names.find(tensor) is None or self.names.find(partner) is None):
            raise BadInput(
                "the base ties this tensor to another, which the adapter does not change",
                where=f"{self.file}, {key}",
                found=f"tied to {partner}",
                fix="train with ensure_weight_tying=True or untie the base first",
            )

    def _refuse_quantized(self, name: str) -> None:
        dtype = self.base.info(name).dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise BadInput(
                "the base tensor is quantized",
                where=f"{self.base.source}, {name}",
                found=dtype,
                fix="bake into the unquantized base",
            )

    def _report_unmatched(self, *, nothing_matched: bool) -> None:
        if not self.unmatched:
            return
        if not nothing_matched:
            fix = "give the base that the adapter was trained on, or --allow-unmatched to skip them"
        elif self.names.needs_transformers:
            fix = "pip install 'emomerge[train]', which resolves names, or give the base that the adapter was trained on"
        else:
            fix = "give the base that the adapter was trained on"
        error = BadInput(
            "the adapter is of another model" if nothing_matched else "an adapter key matches no base tensor",
            where=f"{self.file}, {self.unmatched[0]}",
            expected=f"a tensor of {self.base.source}",
            found="none for any key" if nothing_matched else f"none for {len(self.unmatched)} of its tensors",
            fix=fix,
        )
        if nothing_matched or not self.allow_unmatched:
            raise error
        warnings.warn(Note(error), stacklevel=2)

    @property
    def config_file(self) -> Path:
        """The configuration, for messages."""
        return self.file.with_name(CONFIG)


def open_weights(folder: Path) -> Checkpoint:
    """Open the tensors of an adapter folder. Raises BadInput if they are missing or a pickle."""
    path = folder / WEIGHTS
    pickle = folder / PICKLE
    if not path.is_file() and pickle.is_file():
        raise BadInput(
            "the adapter is a pickle, which is never loaded",
            where=pickle,
            expected=WEIGHTS,
            fix="if you trust it, load it in PEFT and save_pretrained",
        )
    if not path.is_file():
        raise BadInput("the adapter's weights are missing", where=path)
    tensors = open_checkpoint(path)
    if not tensors:
        raise BadInput("the adapter holds no tensors", where=path)
    return tensors


def without_wrappers(name: str) -> str:
    """Return a module's own name, without the components that PEFT's wrappers add."""
    wrappers: Iterable[str] = _WRAPPERS
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _first(value: Tensor, _: Tensor) -> Tensor:
    return value


def _one_after_the_other(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
    return second(first(base))
