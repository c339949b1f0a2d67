"""Models of several parts: a diffusers or sentence-transformers folder, or one file with a prefix for each part (ComfyUI).

All are one `Checkpoint`. Tensors of a folder are named `unet/conv_in.weight`: the part, a slash, the name in the part's own
file. A slash mirrors the path on disk and occurs in no module name, whereas `unet.conv_in.weight` could also be the name of a
tensor in a single file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from emomerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from emomerge.files import JsonObject, read_json

T = TypeVar("T")
MODEL_INDEX, MODULES = "model_index.json", "modules.json"
"""What names the parts of a folder of diffusers, and of sentence-transformers."""
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
        parts: part name → its weights; the name of weights in the folder itself is empty.
        source: origin of the weights, for messages.
        folder: the folder that holds the parts.
    """

    def __init__(self, parts: Mapping[str, Checkpoint], *, source: str, folder: Path) -> None:
        self._parts = parts
        self._names = tuple(sorted(f"{part}/{name}" if part else name for part, weights in parts.items() for name in weights))
        self.paths = tuple(sorted(path for weights in parts.values() for path in weights.paths))
        self.source = source
        self.folder = folder

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor."""
        part, own = self._split(name)
        return self._parts[part].info(own)

    def __getitem__(self, name: str) -> Tensor:
        part, own = self._split(name)
        return self._parts[part][own]

    def _split(self, name: str) -> tuple[str, str]:
        part, slash, own = name.partition("/")
        return (part, own) if slash and part in self._parts else ("", name)


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
    """Return the subfolders that hold parts of a model, sorted.

    They are named by diffusers' `model_index.json`, such as unet, scheduler and tokenizer, or by the `modules.json` of
    sentence-transformers, such as 1_Pooling and 2_Dense.

    Raises:
        BadInput: the file is not JSON of this kind.
    """
    if folder is None:
        return []
    named = [name for name, entry in _index(folder / MODEL_INDEX, JsonObject, {}).items() if isinstance(entry, list)]
    named += [str(module.get("path")) for module in _index(folder / MODULES, list[JsonObject], [])]
    plain = {name for name in named if Path(name).name == name and name not in ("", "..") and len(name) < 64}
    return sorted(name for name in plain if (place := folder / name).is_dir() and place.resolve().parent == folder.resolve())


def _index(path: Path, kind: type[T], absent: T) -> T:
    """Return the content of an index of parts, `absent` if there is none."""
    return read_json(path, kind) if path.is_file() else absent


def weight_stem(folder: Path) -> str:
    """Return the stem of the weight files in a folder, `model` if there are none."""
    found = (stem for stem in reversed(STEMS) if any(folder.glob(f"{stem}*.safetensors*")))
    return next(found, STEMS[0])
