"""Models of several parts: a diffusers folder, or one file with a prefix for each part (latent diffusion, ComfyUI).

Both are one `Checkpoint`. Tensors of a folder are named `unet/conv_in.weight`: the part, a slash, the name in the part's own
file. A slash mirrors the path on disk and occurs in no module name, whereas `unet.conv_in.weight` could also be the name of a
tensor in a single file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from emomerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from emomerge.errors import BadInput

MODEL_INDEX = "model_index.json"
STEMS = ("model", "diffusion_pytorch_model")
"""Names of weight files, without suffix and shard number: of transformers and of diffusers."""
_DENOISER = "model.diffusion_model."
_PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}


class PartsCheckpoint(Checkpoint):
    """The parts of a model as one checkpoint.

    Args:
        parts: part name → its weights.
        source: origin of the weights, for messages.
        folder: the folder that holds the parts.
    """

    def __init__(self, parts: Mapping[str, Checkpoint], *, source: str, folder: Path) -> None:
        self._parts = parts
        self._names = tuple(sorted(f"{part}/{name}" for part, weights in parts.items() for name in weights))
        self.paths = tuple(sorted(path for weights in parts.values() for path in weights.paths))
        self.source = source
        self.folder = folder

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor."""
        part, _, own = name.partition("/")
        return self._parts[part].info(own)

    def __getitem__(self, name: str) -> Tensor:
        part, _, own = name.partition("/")
        return self._parts[part][own]


def parts_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the parts of a model: part name → the prefix of its tensor names; empty for a model of one part."""
    names = checkpoint.names()
    parts = {part: f"{part}/" for part in part_folders(checkpoint.folder)}
    if not parts and any(name.startswith(_DENOISER) for name in names):
        is_unet = any(name.startswith(f"{_DENOISER}input_blocks.") for name in names)
        parts = {"unet" if is_unet else "transformer": _DENOISER}
        parts |= {
            part: prefix
            for part, prefixes in _PREFIXES.items()
            for prefix in prefixes
            if any(name.startswith(prefix) for name in names)
        }
    return {part: prefix for part, prefix in parts.items() if any(name.startswith(prefix) for name in names)}


def part_folders(folder: Path | None) -> list[str]:
    """Return the subfolders that a diffusers `model_index.json` names, such as unet, scheduler and tokenizer; sorted.

    Raises:
        BadInput: the index is not a JSON object.
    """
    index = folder / MODEL_INDEX if folder is not None else None
    if index is None or not index.is_file():
        return []
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("not JSON", where=index, found=error) from None
    if not isinstance(components, dict):
        raise BadInput("not a JSON object", where=index, found=type(components).__name__)
    named = [name for name, entry in components.items() if isinstance(entry, list)]
    return sorted(name for name in named if Path(name).name == name and (index.parent / name).is_dir())


def weight_stem(folder: Path) -> str:
    """Return the stem of the weight files in a folder, `model` if there are none."""
    found = (stem for stem in reversed(STEMS) if any(folder.glob(f"{stem}*.safetensors*")))
    return next(found, STEMS[0])
