"""Models stored in FP8, plainly or with scales, as models in bfloat16: each tensor is dequantized on demand.

Scales have two names and two transports. ComfyUI's earlier files hold `scale_weight`, `scale_input` and a marker `scaled_fp8`,
later ones `weight_scale`, `input_scale` and, for each layer, `comfy_quant`; musubi-tuner writes the same, with a scale for each
row or for each block of a row.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from emomerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from emomerge.errors import BadInput
from emomerge.files import JsonObject, parse_json, read_json_or

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""The formats of ComfyUI's `comfy_quant` that are dequantized here."""
DESCRIPTION = "_quantization_metadata"
"""The key of a header under which ComfyUI describes all layers."""
_SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
_BESIDE = re.compile(r"(.+[./])?(scaled_fp8|scale_input|input_scale|comfy_quant)")
_QUANT = ".comfy_quant"
_PLAIN, _SCALED = "FP8", "FP8 with scales"


class _Format(BaseModel):
    """What is read of a tensor `comfy_quant`."""

    format: str


class Dequantized(Checkpoint):
    """The weights of an FP8 model, without their scales.

    `info` reports bfloat16 for what is stored in FP8. A scaled tensor is q·s in float32, to be rounded once by the writer; a
    plain one is bfloat16, which represents every FP8 number.

    Args:
        stored: the model as it is stored.
    """

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored
        self._scales = _scales(stored)
        hidden = {*self._scales.values(), *(name for name in stored if _BESIDE.fullmatch(name))}
        self._names = tuple(name for name in stored.names() if name not in hidden)
        self.source, self.folder, self.paths = stored.source, stored.folder, stored.paths
        if (file := stored.file) is not None:
            kept = {key: text for key, text in file.metadata.items() if key != DESCRIPTION}
            self.file = file._replace(order=tuple(name for name in file.order if name not in hidden), metadata=kept)

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders of the model."""
        return self._stored.tokenizers_from

    def names(self) -> tuple[str, ...]:
        """Return the names of the weights, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return the shape, and bfloat16 for a tensor in FP8."""
        info = self._stored.info(name)
        return info._replace(dtype=torch.bfloat16) if is_fp8(info.dtype) else info

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if (scale := self._scales.get(name)) is not None:
            return _scaled(tensor, self._stored[scale], where=f"{self.source}, {scale}")
        return tensor.to(torch.bfloat16) if is_fp8(tensor.dtype) else tensor


def is_fp8(dtype: torch.dtype) -> bool:
    """Return whether a dtype is FP8 with a mantissa."""
    return dtype.is_floating_point and dtype.itemsize == 1 and "e8m0" not in str(dtype)


def fp8_kind(checkpoint: Checkpoint) -> str | None:
    """Return how the weights of a model are stored if `Dequantized` can read them, else None.

    A configuration that declares a quantization belongs to a library with a format of its own.
    """
    infos = {name: checkpoint.info(name) for name in checkpoint}
    if not any(is_fp8(info.dtype) and len(info.shape) > 1 for info in infos.values()) or _is_declared(checkpoint):
        return None
    scales = [(match[1], name) for name in infos if (match := _SCALE.fullmatch(name))]
    for module, name in scales:
        weight = infos.get(f"{module}.weight")
        if weight is None or not is_fp8(weight.dtype) or infos[name].dtype.itemsize == 1:
            return None
    others = any(name.endswith((".weight_scale_inv", ".weight_scale_2")) for name in infos)
    if others or foreign_format(checkpoint) is not None:
        return None
    return _SCALED if scales else _PLAIN


def foreign_format(checkpoint: Checkpoint) -> str | None:
    """Return the format of a layer that ComfyUI quantized to anything but FP8, such as nvfp4; None if there is none."""
    for name in checkpoint:
        if name.endswith(_QUANT):
            found = _format_of(checkpoint, name)
            if found not in FORMATS:
                return found
    return None


def _format_of(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    where = f"{checkpoint.source}, {name}"
    if info.dtype != torch.uint8 or info.numel > 2**16:
        raise BadInput("not a description of a quantization", where=where, expected="JSON as bytes", found=info.dtype)
    text = bytes(checkpoint[name].flatten().tolist())
    return parse_json(text, _Format, where=where, what="not a description of a quantization").format


def _is_declared(checkpoint: Checkpoint) -> bool:
    folders = {path.parent for path in checkpoint.paths}
    return any("quantization_config" in read_json_or(folder / "config.json", JsonObject, {}) for folder in folders)


def _scales(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name of each weight's scale, after a check of its shape."""
    found: dict[str, str] = {}
    for name in checkpoint:
        if (match := _SCALE.fullmatch(name)) is None:
            continue
        weight, shape = f"{match[1]}.weight", checkpoint.info(name).shape
        if weight in found:
            raise BadInput("a weight has two scales", where=f"{checkpoint.source}, {weight}", found=f"{found[weight]}, {name}")
        rows, *columns = checkpoint.info(weight).shape or (1,)
        fits = math.prod(shape) == 1 or shape in ((rows,), (rows, 1))
        if not fits and len(shape) == 3 and shape[0] == rows and shape[2] == 1 and shape[1]:
            fits = math.prod(columns) % shape[1] == 0
        if not fits:
            raise BadInput(
                "a scale does not fit its weight", where=f"{checkpoint.source}, {name}",
                expected=f"(), (1,), ({rows}, 1) or ({rows}, blocks, 1)", found=shape,
            )  # fmt: skip
        found[weight] = name
    return found


def _scaled(tensor: Tensor, scale: Tensor, *, where: str) -> Tensor:
    """Return q·s in float32, with s for all, for each row or for each block of a row."""
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()):
        raise BadInput("a scale is NaN or infinite", where=where)
    if scale.numel() == 1:
        return tensor.float() * scale.flatten()
    rows = tensor.float().reshape(len(tensor), -1 if scale.ndim < 3 else scale.shape[1], *([] if scale.ndim < 3 else [-1]))
    return (rows * scale.reshape(len(tensor), *([1] if scale.ndim < 3 else scale.shape[1:]))).reshape(tensor.shape)
