"""Types of adapters that PEFT's own layer merges: one module at a time, in float32, from a model of that module alone."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from emomerge.adapters.change import Change
from emomerge.adapters.peft.adapter import PeftReader, Shape, without_wrappers
from emomerge.adapters.peft.files import PREFIX
from emomerge.adapters.peft.types import LIVE
from emomerge.checkpoints import Checkpoint, working_dtype
from emomerge.errors import BadInput
from emomerge.extras import require_module
from emomerge.numerics.threads import one_thread

_ELSEWHERE: Mapping[str, Any] = {
    "target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "modules_to_save": None, "bias": "none", "inference_mode": True, "task_type": None, "auto_mapping": None,
    "base_model_name_or_path": None,
}  # fmt: skip
"""Fields that choose modules or name the base, with their values for a model of one module."""


_LARGE = 10_000


class Layer(NamedTuple):
    """A layer of the base, without its numbers."""

    kind: Literal["Linear", "Conv1D", "Conv", "Embedding"]
    shape: Shape
    """Of its weight, as the base stores it."""
    bias: Shape | None


class LiveReader(PeftReader):
    """Reads an adapter through PEFT.

    Raises:
        MissingExtra: PEFT is not installed, or too old.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], base: Checkpoint, allow_unmatched: bool) -> None:
        self.kind = LIVE[config["peft_type"]]
        require_module(f"an adapter of the type {self.kind.name}", "peft")
        super().__init__(folder, config, base, allow_unmatched)
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        self.shared: dict[str, str] = {}
        self._own = re.compile(rf"(.+?)\.({self.kind.prefix}\w*(?:\..+)?)")

    def check_values(self, key: str) -> None:
        """Also accept the indices that some types store."""
        if "indices" not in key or self.tensors.info(key).dtype.is_floating_point:
            super().check_values(key)

    def claim(self, name: str, key: str) -> bool:
        """Take the tensors of the type, by its prefix."""
        if key.startswith(f"base_model.{self.kind.prefix}"):
            self.shared[key] = key
        elif match := self._own.fullmatch(name):
            self.modules[without_wrappers(match[1])][match[2]] = key
        else:
            return False
        return True

    def _refuse_large_settings(self) -> None:
        """Raise BadInput for a rank or size beyond all tensors of the adapter, for which PEFT would fill the memory."""
        largest = max(self.tensors.info(key).numel for key in self.tensors)
        for field, value in self.config.items():
            if type(value) is int and "seed" not in field and value > max(_LARGE, largest):
                raise BadInput(
                    "a setting is larger than every tensor of the adapter", where=f"{self.config_file}, {field}",
                    expected=f"at most {max(_LARGE, largest)}", found=value,
                )  # fmt: skip

    def add_modules(self) -> None:
        """Add the changes of the weight and the bias of every module, after a check that PEFT can load its tensors."""
        self._refuse_large_settings()
        for name in sorted(self.modules):
            key = next(iter(self.modules[name].values()))
            self.refuse_tied(f"{name}.weight", key)
            targets = self.targets(f"{name}.weight", key)
            if not targets:
                continue
            if targets[0][1] is not None:
                raise BadInput(
                    f"{self.kind.name} of a part of a tensor cannot be baked", where=f"{self.file}, {key}", found=targets[0][0]
                )
            layer = self._layer(name, self.base.info(targets[0][0]).shape)
            where = f"{self.file}, {name}"
            with _placed(layer, None, None) as holder:
                _loaded(holder, name, self.config, self._tensors(name), where)
            parameters = {"weight": targets[0][0]}
            if layer.bias is not None and (bias := self.names.find(f"{name}.bias")) is not None:
                parameters["bias"] = bias
            for parameter, target in parameters.items():
                replace = partial(self._merged, name, layer, parameter, parameters)
                self.add(target, key, Change(replace=replace))

    def _layer(self, name: str, shape: Shape) -> Layer:
        bias = self.names.find(f"{name}.bias")
        live = self.names.module(name)
        kind: Literal["Linear", "Conv1D", "Conv", "Embedding"] = "Linear" if len(shape) == 2 else "Conv"
        if isinstance(live, nn.Embedding):
            kind = "Embedding"
        elif len(shape) == 2:
            conv1d = self.is_conv1d(name)
            if conv1d or (conv1d is None and self.config.get("fan_in_fan_out")):
                kind = "Conv1D"
        return Layer(kind, shape, None if bias is None else self.base.info(bias).shape)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        own = {f"{PREFIX}{name}.{part}": self.tensors[key] for part, key in self.modules[name].items()}
        return own | {name: self.tensors[key] for name, key in self.shared.items()}

    def _merged(self, name: str, layer: Layer, parameter: str, parameters: Mapping[str, str], tensor: Tensor) -> Tensor:
        """Return the merged weight or bias; `tensor` is this one of the base."""
        given = {each: tensor if each == parameter else self.base[target] for each, target in parameters.items()}
        with one_thread(), _placed(layer, given["weight"], given.get("bias")) as holder:
            model = _loaded(holder, name, self.config, self._tensors(name), f"{self.file}, {name}")
            merged = model.merge_and_unload().get_submodule(name)
            found: Tensor = getattr(merged, parameter).detach()
        return found.clone()


@contextmanager
def _placed(layer: Layer, weight: Tensor | None, bias: Tensor | None) -> Iterator[nn.Module]:
    """Yield a layer with this weight and bias, or zeros that take no memory. PEFT's random numbers and warnings stay within."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), torch.no_grad():
        with torch.device("meta"):
            module = _layer_of(layer)
        for name, tensor, shape in (("weight", weight, layer.shape), ("bias", bias, layer.bias)):
            if shape is not None:
                value = torch.zeros(()).expand(shape) if tensor is None else tensor.to(working_dtype(tensor.dtype), copy=True)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        yield module


def _layer_of(layer: Layer) -> nn.Module:
    first, second, *kernel = layer.shape
    biased = layer.bias is not None
    if layer.kind == "Embedding":
        return nn.Embedding(first, second)
    if layer.kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        conv1d: nn.Module = Conv1D(second, first)
        return conv1d
    if layer.kind == "Linear":
        return nn.Linear(second, first, bias=biased)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    return convolution(second, first, tuple(kernel), bias=biased)  # type: ignore[arg-type]


def _loaded(layer: nn.Module, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    """Return a PEFT model whose only module is this layer, with the tensors of the adapter loaded."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    top = nn.Module()
    parent, *path = top, *name.split(".")
    for part in path[:-1]:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(path[-1], layer)
    try:
        model = get_peft_model(top, _config_of(config, name, where))
        expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    except BadInput:
        raise
    except Exception as error:  # PEFT checks its settings with any type of error
        raise BadInput("PEFT refuses this adapter", where=where, found=error) from None
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if key not in expected or key not in found or expected[key] != found[key]:
            raise BadInput(
                "an adapter tensor is not the one that PEFT expects", where=f"{where}, {key}",
                expected=expected.get(key, "no such tensor"), found=found.get(key, "no such tensor"),
            )  # fmt: skip
    weight = next(layer.parameters())
    if weight.dtype == torch.float64:
        model = model.double()
    set_peft_model_state_dict(model, {key: _widened(value) for key, value in tensors.items()})
    return model.eval()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor.dtype)) if tensor.is_floating_point() else tensor


def _config_of(config: Mapping[str, Any], name: str, where: str) -> Any:
    """Return PEFT's configuration for one module. Raises BadInput for a field that the installed version does not know."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    kind = config["peft_type"]
    if kind not in PeftType.__members__ or PeftType[kind] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise BadInput("the installed version of PEFT does not know this kind of adapter", where=where, found=kind)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    known = {field.name for field in fields(cls)}
    for field, value in config.items():
        if value and field not in known:
            raise BadInput("the installed version of PEFT does not know this setting", where=f"{where}, {field}", found=value)
    given = {field: value for field, value in config.items() if field in known and field not in ("peft_type", *_ELSEWHERE)}
    chosen = {field: value for field, value in _ELSEWHERE.items() if field in known}
    return cls(**given, **(chosen | {"target_modules": [name]}))
