"""Read adapter files of image models: the change of each base tensor, with every key accounted for."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.formulas import ModuleChange, module_of, split_key
from emomerge.adapters.images.edits import Edit, change_of, edits_of, shape_of
from emomerge.adapters.images.grammar import read_header
from emomerge.adapters.images.layouts import Place
from emomerge.adapters.images.recognition import family_of, trainer_of
from emomerge.adapters.images.remarks import remarks
from emomerge.adapters.images.targets import Parameters, Targets
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.companions import note
from emomerge.errors import BadInput

_IGNORED = re.compile(r".*\bposition_ids")
"""Keys without an effect."""
_EFFECTS = {"lora_up", "diff", "diff_b", "diff_m", "w_norm", "b_norm"}
"""Suffixes of tensors without which a module has no effect."""


class _Strange(NamedTuple):
    """A kind of keys that are not read.

    Args:
        what: what is wrong.
        fix: what to do about it.
        keys: matches such keys.
    """

    what: str
    fix: str
    keys: re.Pattern[str]


_STRANGE = (
    _Strange(
        "keys that are not of an adapter, but embeddings",
        "remove them, and load them in your image program",
        re.compile(r"bundle_emb\..+"),
    ),
    _Strange(
        "a control LoRA of Black Forest Labs, which replaces norms and enlarges img_in",
        "load it in diffusers or ComfyUI instead: a model with it has other inputs than its base",
        re.compile(r".+\.(query|key)_norm\.scale"),
    ),
    _Strange("keys that are not of an adapter", "remove them if they are not needed", re.compile(r".*", re.DOTALL)),
)
"""The first that matches names the key."""


def read_file(path: Path, base: Checkpoint, *, allow_unmatched: bool) -> dict[str, Change]:
    """Return the changes by base tensor name; see `AdapterFormat.read`."""
    file = AdapterFile(path)
    modules = file.modules()
    targets = Targets(base)
    found = {name: targets.find(name, where=f"{path}, {name}") for name in modules}
    unmatched = [name for name, parameters in found.items() if parameters is None and not file.is_zero(name)]
    if unmatched:
        _report_unmatched(file, unmatched, targets, base, allow_unmatched=allow_unmatched)
    for remark in remarks(file.tensors, file.metadata):
        note(f"{path}: {remark}")
    edits: dict[str, list[Edit]] = defaultdict(list)
    for name, module in modules.items():
        parameters = found[name]
        for parameter, formula in module.parameters.items() if parameters is not None else ():
            where = f"{path}, {name}"
            places = _places(parameters or {}, parameter, where=where)
            formula.check(shape_of(places, base), where=where)
            for edit in edits_of(formula, places, base, key=name):
                _add(edits[edit.place.tensor], edit, base, path)
    return {name: change_of(edits[name], base) for name in sorted(edits)}


def facts_of(path: Path) -> dict[str, Any]:
    """Return what `emomerge inspect` shows about an adapter file."""
    file = AdapterFile(path)
    modules = file.modules()
    header = read_header(path)
    ranks = Counter(module.rank for module in modules.values() if module.rank is not None)
    alphas = Counter("none" if module.alpha is None else f"{module.alpha:g}" for module in modules.values())
    found = {
        "family": family_of(modules),
        "trainer": None if header is None else trainer_of(header.sizes, header.metadata),
        "modules": len(modules),
        "kinds": [f"{kind} × {count}" for kind, count in Counter(module.kind for module in modules.values()).most_common()],
        "ranks": [f"{rank} × {count}" for rank, count in sorted(ranks.items())],
        "alphas": [f"{alpha} × {count}" for alpha, count in alphas.most_common()],
        "notes": remarks(file.tensors, file.metadata),
    }
    return {key: value for key, value in found.items() if value}


def fit_of(path: Path, base: Checkpoint) -> dict[str, Any]:
    """Return what `emomerge inspect` shows about an adapter file and a base."""
    file, targets = AdapterFile(path), Targets(base)
    unmatched = [name for name in sorted(file.tensors) if targets.find(name, where=f"{path}, {name}") is None]
    total = len(file.tensors)
    found = {"family of the base": targets.family, "modules in the base": f"{total - len(unmatched)} of {total}"}
    if unmatched:
        found["not in the base"] = ", ".join(unmatched[:3]) + (" …" if len(unmatched) > 3 else "")
    return {key: value for key, value in found.items() if value}


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter file by module."""

    path: Path
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """Module → canonical suffix → tensor."""

    def __post_init__(self) -> None:
        opened = open_checkpoint(self.path)
        keys: dict[tuple[str, str], str] = {}
        unknown = []
        for key in opened:
            found = split_key(key)
            if found is None:
                unknown += [] if _IGNORED.fullmatch(key) else [key]
                continue
            if found in keys:
                raise BadInput("one tensor has two spellings", where=f"{self.path}, {key}", found=f"also {keys[found]}")
            keys[found] = key
            self.tensors[found[0]][found[1]] = opened[key]
        if unknown:
            strange = next(kind for kind in _STRANGE if kind.keys.fullmatch(unknown[0]))
            found_of = f"{len(unknown)} of {len(opened)} tensors"
            raise BadInput(strange.what, where=f"{self.path}, {unknown[0]}", found=found_of, fix=strange.fix)

    def modules(self) -> dict[str, ModuleChange]:
        """Return what the adapter does to each module, in the order of the names."""
        rs_lora = re.search(r'"?rs_lora"?\s*[:=]\s*"?true', self.metadata.get("ss_network_args", ""), re.IGNORECASE) is not None
        return {
            name: module_of(self._with_alpha(name), where=f"{self.path}, {name}", rs_lora=rs_lora)
            for name in sorted(self.tensors)
        }

    def is_zero(self, module: str) -> bool:
        """Return whether a module has no effect on any base."""
        tensors = self.tensors[module]
        effects = [tensor for suffix, tensor in tensors.items() if suffix in _EFFECTS]
        others = tensors.keys() - _EFFECTS - {"lora_down", "lora_mid", "alpha"}
        return bool(effects) and not others and not any(bool(tensor.count_nonzero()) for tensor in effects)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata in the header of the file."""
        header = read_header(self.path)
        return {} if header is None else header.metadata

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        """The configuration that diffusers writes into the header; empty if there is none."""
        try:
            found = json.loads(self.metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise BadInput("not JSON", where=f"{self.path}, lora_adapter_metadata of the header")
        return found

    def _with_alpha(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a module, with α from the header if the file has none beside them."""
        tensors = dict(self.tensors[module])
        if "lora_down" not in tensors or "alpha" in tensors or not self._configuration:
            return tensors
        part, _, name = module.partition(".")
        settings = {key.removeprefix(f"{part}."): value for key, value in self._configuration.items() if key.startswith(part)}
        alpha = _matching(settings.get("alpha_pattern"), name, settings.get("lora_alpha"))
        if alpha is None:
            return tensors
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadInput("not a number", where=f"{self.path}, lora_adapter_metadata of the header, lora_alpha", found=alpha)
        if settings.get("use_rslora"):
            alpha *= math.sqrt(len(tensors["lora_down"]))
        return tensors | {"alpha": torch.tensor(alpha, dtype=torch.float64)}


def _matching(pattern: Any, module: str, default: Any) -> Any:
    """Return the value of the first name of a pattern that is the end of a module's name."""
    for name, value in pattern.items() if isinstance(pattern, dict) else ():
        if f".{module}".endswith(f".{name.removeprefix('^')}"):
            return value
    return default


def _places(parameters: Parameters, parameter: str, *, where: str) -> tuple[Place, ...]:
    """Return the places of a parameter; the weight of a norm may be called `scale`."""
    found = parameters.get(parameter) or (parameters.get("scale") if parameter == "weight" else None)
    if found is None:
        raise BadInput(
            f"the module of the base has no {parameter}", where=where, found=", ".join(sorted(parameters)),
            fix="give the base that the adapter was trained on",
        )  # fmt: skip
    return found


def _add(edits: list[Edit], edit: Edit, base: Checkpoint, path: Path) -> None:
    """Add an edit to those of the same tensor."""
    name = edit.place.tensor
    dtype = base.info(name).dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise BadInput(
            "the base tensor is quantized", where=f"{base.source}, {name}", found=dtype, fix="bake into the unquantized base"
        )
    if clash := next((other for other in edits if other.overlaps(edit)), None):
        found = f"{clash.key} and {edit.key}"
        fix = "remove one of the two: the file names this module in two ways"
        raise BadInput("two modules of the adapter change one base tensor", where=f"{path}, {name}", found=found, fix=fix)
    edits.append(edit)


def _report_unmatched(
    file: AdapterFile, unmatched: list[str], targets: Targets, base: Checkpoint, *, allow_unmatched: bool
) -> None:
    """Raise BadInput about modules that the base does not have, or warn if some of them match and that is allowed."""
    total = len(file.tensors)
    ours, theirs = family_of(file.tensors), targets.family
    nothing = len(unmatched) == total
    fix = "give the base that the adapter was trained on" + ("" if nothing else ", or --allow-unmatched to skip them")
    error = BadInput(
        "the adapter is of another model" if nothing else "modules of the adapter match no tensor of the base",
        where=f"{file.path}, {unmatched[0]}",
        expected=f"a module of {base.source}" + (f" ({theirs})" if theirs else ""),
        found=f"{total - len(unmatched)} of {total} modules match" + (f"; the adapter is for {ours}" if ours else ""),
        fix=fix,
    )
    if nothing or not allow_unmatched:
        raise error
    note(str(error))
