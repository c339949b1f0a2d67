"""Write low-rank factors as an adapter file of image models, in the names of sd-scripts (kohya) or of diffusers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from emomerge.adapters.images.edits import arranged
from emomerge.adapters.images.families import DENOISERS, TEXT_ENCODERS, family_of
from emomerge.adapters.images.layouts import Family, Place, Shapes, Spelling, alias, native
from emomerge.adapters.images.targets import denoiser_prefix
from emomerge.checkpoints import Checkpoint, all_finite
from emomerge.checkpoints.metadata import date
from emomerge.checkpoints.parts import parts_of
from emomerge.errors import BadInput

ImageFormat = Literal["kohya", "diffusers"]
_ENCODERS = {"text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_DIFFUSERS = ("down_blocks.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.")
_VERSIONS = {"SDXL": "sdxl_base_v1-0", "SD1.5 or SD2": "sd_v1", "Flux.1": "flux1", "SD3": "sd3"}
"""Family → `ss_base_model_version` of sd-scripts."""
_ARCHITECTURES = {"SDXL": "stable-diffusion-xl-v1-base", "SD1.5 or SD2": "stable-diffusion-v1", "Flux.1": "flux-1-dev"}
"""Family → `modelspec.architecture`, if the base does not say."""


class Written(NamedTuple):
    """A module as adapter files name it.

    Args:
        key: name of the module in the file.
        places: the rows of base tensors that are its weight.
    """

    key: str
    places: tuple[Place, ...]

    def weight(self, of: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of the module, from whole tensors by their names in the base, as the module arranges them."""
        parts = []
        for place in self.places:
            tensor = of[place.tensor]
            rows = tensor if place.rows is None else tensor[place.rows[0] : place.rows[1]]
            parts.append(arranged(rows, place.order))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Factors(NamedTuple):
    """ΔW ≈ BA of one module, with α = r."""

    key: str
    a: Tensor
    """(r, in, *kernel)."""
    b: Tensor
    """(out, r), with a kernel of 1×1 for a convolution."""


@dataclass(frozen=True)
class ImageAdapter:
    """An adapter of an image model, ready to be written."""

    factors: Sequence[Factors]
    style: ImageFormat
    family: str | None
    base_metadata: Mapping[str, str]

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the content of the file. Raises BadInput if a value is too large for `dtype`."""
        found: dict[str, Tensor] = {}
        for key, a, b in self.factors:
            for name, factor in zip(self._names(key), (a, b), strict=True):
                found[f"{key}.{name}.weight"] = factor.to("cpu", dtype).contiguous()
            if self.style == "kohya":
                found[f"{key}.alpha"] = torch.tensor(float(len(a))).to(dtype)
        for name, tensor in found.items():
            if not all_finite(tensor):
                raise BadInput(f"values too large for {dtype}", where=name, fix="write it as bfloat16 or float32")
        return found

    def _names(self, key: str) -> tuple[str, str]:
        """Return how A and B are called; diffusers 0.42 accepts other names in text encoders than in denoisers."""
        if self.style == "kohya":
            return "lora_down", "lora_up"
        if key.endswith(".text_projection"):
            return "lora.down", "lora.up"
        return ("lora_linear_layer.down", "lora_linear_layer.up") if key.startswith("text_encoder") else ("lora_A", "lora_B")

    def content(self, dtype: torch.dtype, *, title: str) -> bytes:
        """Return the bytes of the file, with the metadata that other programs show."""
        tensors = self.tensors(dtype)
        if self.style == "diffusers":
            return bytes(save(tensors, {"format": "pt", **self._modelspec(title)}))
        trained = self._trained(title)
        plain = save(tensors, trained)  # sd-scripts computes the hashes of a file with only its own metadata
        body = plain[8 + int.from_bytes(plain[:8], "little") :]
        hashes = {
            "sshs_model_hash": hashlib.sha256(body).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(plain[2**20 : 2**20 + 2**16]).hexdigest()[:8],
        }
        return bytes(save(tensors, {"format": "pt", **trained, **hashes, **self._modelspec(title)}))

    def _trained(self, title: str) -> dict[str, str]:
        """Return the keys by which sd-scripts and the programs that show its files know what a file is."""
        ranks = sorted({len(a) for _, a, _ in self.factors})
        convolutions = sorted({len(a) for _, a, _ in self.factors if a.ndim == 4 and a.shape[2:] != (1, 1)})
        arguments = f'{{"conv_dim": "{convolutions[-1]}", "conv_alpha": "{convolutions[-1]}"}}' if convolutions else "{}"
        found = {
            "ss_network_module": "networks.lora", "ss_network_dim": str(ranks[-1]), "ss_network_alpha": str(float(ranks[-1])),
            "ss_network_args": arguments, "ss_output_name": title, "ss_v2": "False",
        }  # fmt: skip
        version = _VERSIONS.get(self.family or "")
        return found | ({"ss_base_model_version": version} if version else {})

    def _modelspec(self, title: str) -> dict[str, str]:
        known = self.base_metadata.get("modelspec.architecture") or _ARCHITECTURES.get(self.family or "")
        found = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title, "modelspec.date": date()}
        if known:
            found["modelspec.architecture"] = f"{known.removesuffix('/lora')}/lora"
        return found | {
            "modelspec.implementation": "diffusers" if self.style == "diffusers" else "https://github.com/kohya-ss/sd-scripts"
        }


def modules_of(base: Checkpoint, style: ImageFormat) -> tuple[list[Written], str | None]:
    """Return every layer of a base to which an adapter file can add, as that kind of file names it, and the base's family.

    Linear layers and convolutions of the denoiser, and the linear layers of CLIP. sd-scripts names the modules of a model by
    the layout in which it holds it: diffusers' for Stable Diffusion 1 and 2, the original one for others.
    """
    whole = {name: base.info(name).shape for name in base}
    found: list[Written] = []
    family: Family | None = None
    if (prefix := denoiser_prefix(base)) is not None:
        shapes = _within(whole, prefix)
        family = family_of(shapes, DENOISERS)
        wants_diffusers = style == "diffusers" or (family is not None and family.name.startswith("SD1.5"))
        spelling = _in_layout(shapes, family, diffusers=wants_diffusers)
        part = "unet" if any(name.startswith(("input_blocks.", "down_blocks.")) for name in shapes) else "transformer"
        start = "lora_unet_" if style == "kohya" else f"{part}."
        found += _written(spelling, prefix, start, style, whole)
    prefixes = parts_of(base)
    for part, start in _ENCODERS.items():
        if part in prefixes:
            shapes = _within(whole, prefixes[part])
            encoder = family_of(shapes, TEXT_ENCODERS)
            if encoder is None or encoder.name != "CLIP":
                continue
            start = "lora_te1_" if part == "text_encoder" and "text_encoder_2" in prefixes else start
            spellings = native(shapes) | alias(shapes, encoder.rules(tuple(shapes)))
            named = {
                name: places for name, places in spellings.items() if re.match(r"text_model\.encoder|text_projection\.", name)
            }
            found += _written(named, prefixes[part], start if style == "kohya" else f"{part}.", style, whole)
    return found, None if family is None else family.name


def _within(whole: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in whole.items() if name.startswith(prefix)}


def _in_layout(shapes: Shapes, family: Family | None, *, diffusers: bool) -> Spelling:
    """Return the names of a denoiser in one of its two layouts."""
    own = native(shapes)
    if family is None:
        return own
    is_diffusers = any(name.startswith(_DIFFUSERS) for name in shapes) or not Family(
        family.name, family.marks[:1], family.rules
    ).has(shapes)
    if is_diffusers == diffusers:
        return own
    other = alias(shapes, family.rules(tuple(shapes)))
    renamed = {place.tensor for places in other.values() for place in places}
    return other | {name: places for name, places in own.items() if name not in renamed}


def _written(spelling: Spelling, prefix: str, start: str, style: ImageFormat, whole: Shapes) -> list[Written]:
    found = []
    for name, places in spelling.items():
        module, _, parameter = name.rpartition(".")
        places = tuple(place._replace(tensor=prefix + place.tensor) for place in places)
        if parameter == "weight" and len(whole[places[0].tensor]) in (2, 4):
            found.append(Written(start + (module.replace(".", "_") if style == "kohya" else module), places))
    return found
