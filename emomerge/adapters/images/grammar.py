"""Recognise adapter files of image models by the header of the file: the tensor names, their sizes and the metadata.

Without torch, and cheap: every path that a user gives is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from emomerge.adapters.formulas import split_key
from emomerge.errors import BadInput
from emomerge.files import JsonObject, parse_json

SUFFIX = ".safetensors"
_LARGEST_HEADER = 100_000_000
_EXPLICIT = re.compile(r"(lora|oft)_(unet|te\d?|transformer|prior)_.+|lycoris_.+|bundle_emb\..+|.+\.processor\.\w+_lora\d?\..+")
_PARTS = re.compile(
    r"(base_model\.model\.)?(unet|prior|transformer(?!\.h\.)|text_encoders?(_\d)?|diffusion_model|model\.diffusion_model|net"
    r"|llm_adapter|text_conditioner|clip_[lg]|t5"
    r"|(single_)?transformer_blocks|double_blocks|single_blocks|joint_blocks|input_blocks|output_blocks|middle_block"
    r"|down_blocks|up_blocks|mid_block|noise_refiner|context_refiner|blocks\.\d+\.(self_attn|cross_attn|attn1|attn2)"
    r"|layers\.\d+\.(attention|attn)\.(qkv|out|to_\w+))\.(?!$).*"
)
"""Names of parts and blocks of image models, by which files are told apart whose factors alone (`lora_A`) say nothing."""
_PEFT = {"lora_down", "lora_up", "lora_up.bias", "magnitude", "oft_R"}


class Header(NamedTuple):
    """What the header of an adapter file says."""

    sizes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header | None:
    """Return the header of a safetensors file; None if `path` is none, or damaged."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if path.suffix != SUFFIX or not path.is_file():
        return None
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _read(path: Path, size: int, _changed: int) -> Header | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                return None
            header = parse_json(file.read(length), JsonObject, where=path)
    except (OSError, BadInput):
        return None
    metadata = header.pop("__metadata__", None)
    sizes = {name: _shape(entry) for name, entry in header.items()}
    return Header(sizes, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {})


def _shape(entry: Any) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return tuple(shape) if isinstance(shape, list) and all(type(size) is int for size in shape) else ()


def is_adapter(header: Header) -> bool:
    """Return whether most elements of a file are in tensors that adapters of image models consist of.

    Some models contain LoRA factors beside their weights, so a single adapter tensor proves nothing.
    """
    ours = total = 0
    explicit = False
    for name, shape in header.sizes.items():
        count = math.prod(shape)
        total += count
        found = split_key(name)
        if found is None or (found[1] in ("weight", "alpha") and not _EXPLICIT.fullmatch(name)):
            ours += count if _EXPLICIT.fullmatch(name) or (found is not None and found[1] == "alpha") else 0
            continue
        ours += count
        explicit = explicit or _is_explicit(name, found[1])
    return explicit and 2 * ours > total


def _is_explicit(name: str, suffix: str) -> bool:
    """Return whether a tensor can only be of a file that says all about itself, unlike those of PEFT's folders."""
    if _EXPLICIT.fullmatch(name) or _PARTS.fullmatch(name):
        return True
    spelled = name.endswith((".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"))
    return spelled or (suffix not in _PEFT and not name.startswith("base_model."))
