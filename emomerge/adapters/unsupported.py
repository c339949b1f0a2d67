"""Adapter files that no format of the table reads, recognised by their tensor names so that none is taken for a model."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from emomerge.adapters.peft.files import CONFIG
from emomerge.checkpoints import Checkpoint
from emomerge.checkpoints.fp8 import Dequantized, foreign_format, fp8_kind
from emomerge.checkpoints.gguf import UNQUANTIZED, GgufCheckpoint
from emomerge.errors import BadInput


class Family(NamedTuple):
    """A family of adapter files.

    Args:
        name: as its users call it.
        keys: matches the names of its tensors.
        fix: what to do with such a file.
    """

    name: str
    keys: re.Pattern[str]
    fix: str


FAMILIES = (
    Family(
        "PEFT adapter without its configuration",
        re.compile(
            r"base_model\.model\..+\.(lora_(embedding_)?[ABE]|lora_magnitude_vector|ia3_l|vera_\w+|randlora_\w+|hra_u"
            r"|oft_(embedding_)?R|hada_\w+|lokr_\w+|boft_\w+|fourierft_spectrum|(miss|bone)_block|trainable_tokens_delta"
            r"|ln_tuning_layers)(\..+)?|base_model\.(vera|randlora)_[AB]|prompt_embeddings"
        ),
        f"give the adapter's folder, with its {CONFIG}",
    ),
    Family(
        "LoRA without a configuration",
        re.compile(r".+\.lora_(embedding_)?[AB](\.\w+)?(\.weight)?"),
        f"load it in PEFT with its rank and alpha, save_pretrained, and give that folder (with {CONFIG})",
    ),
)
"""The first family with a matching tensor names the file."""
_COMPANION = re.compile(
    r"base_model\.model\.(?!.*\bbase_layer\b).+|bundle_emb\..+|.+\.(alpha|diff(_[bm])?|set_weight|[wb]_norm)"
)
"""Tensors that accompany an adapter's own, such as a retrained head."""


def family_of(checkpoint: Checkpoint) -> Family | None:
    """Return the family of adapter files that a checkpoint belongs to, or None if it is a model.

    Some models contain LoRA factors beside their weights (Phi-4-multimodal, jina-embeddings-v3), so a file counts as an
    adapter only if most of its elements are in tensors that adapters consist of.
    """
    found: Family | None = None
    ours = total = 0
    for family in reversed(FAMILIES):
        if any(family.keys.fullmatch(name) for name in checkpoint):
            found = family
    if found is None:
        return None
    for name in checkpoint:
        count = checkpoint.info(name).numel
        total += count
        if _COMPANION.fullmatch(name) or any(family.keys.fullmatch(name) for family in FAMILIES):
            ours += count
    return found if 2 * ours > total else None


_QUANTIZED = {
    "SVDQuant of nunchaku": re.compile(r".+\.(wscales|wtscale|smooth_factor|smooth)"),
    "GPTQ": re.compile(r".+\.g_idx"),
    "AWQ": re.compile(r".+\.qzeros"),
    "bitsandbytes, 4 bits": re.compile(r".+\.quant_state\.bitsandbytes__\w+"),
    "bitsandbytes, 8 bits": re.compile(r".+\.SCB"),
    "compressed-tensors": re.compile(r".+\.weight_packed"),
    "NVFP4": re.compile(r".+\.weight_scale_2"),
    "MXFP4": re.compile(r".+_blocks"),
    "HQQ": re.compile(r".+\.W_q"),
}
"""How models are quantized, by tensors that occur in no other model; the first that matches."""
_SCALE = re.compile(r"(.+)\.(weight_scale(_inv)?|scale_weight)")
READ_AS_BF16 = "bake and merge read it as bfloat16"


def quantization_of(checkpoint: Checkpoint) -> str | None:
    """Return how the weights of a model are quantized, None if they are not."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.kind
    stored = {info.dtype for info in map(checkpoint.info, checkpoint)}
    if not any(dtype.itemsize == 1 or not dtype.is_floating_point for dtype in stored):
        return None
    for kind, names in _QUANTIZED.items():
        if any(names.fullmatch(name) for name in checkpoint):
            return kind
    if (foreign := foreign_format(checkpoint)) is not None:
        return foreign
    for name in checkpoint:
        if (match := _SCALE.fullmatch(name)) is not None:
            return _kind_of(checkpoint, name, f"{match[1]}.weight")
    return fp8_kind(checkpoint)


def _kind_of(checkpoint: Checkpoint, scale: str, weight: str) -> str:
    """Return how a weight is quantized that has a scale."""
    if "e8m0" in str(checkpoint.info(scale).dtype):
        return "MXFP8"
    dtype = checkpoint.info(weight).dtype if weight in checkpoint else torch.float8_e4m3fn
    return "FP8 with scales" if dtype.is_floating_point else "8-bit integers with scales"


def dequantized(checkpoint: Checkpoint, *, where: object) -> Checkpoint:
    """Return a model with weights as numbers: as it is, or dequantized from FP8.

    Raises:
        BadInput: the weights are codes of a kind that is not read; the message names it.
    """
    if (kind := quantization_of(checkpoint)) is None or isinstance(checkpoint, GgufCheckpoint):
        return checkpoint
    if kind == fp8_kind(checkpoint):
        return Dequantized(checkpoint)
    raise BadInput(f"the model is quantized ({kind})", where=where, fix=UNQUANTIZED)


def how_to_use(checkpoint: Checkpoint, kind: str) -> str:
    """Return what to do with a model that is quantized in this way."""
    return READ_AS_BF16 if isinstance(checkpoint, GgufCheckpoint) or kind == fp8_kind(checkpoint) else UNQUANTIZED


def refuse_adapter(checkpoint: Checkpoint, *, where: object) -> None:
    """Raise BadInput, naming the family, if a checkpoint is an adapter file that no format reads."""
    if (family := family_of(checkpoint)) is not None:
        raise BadInput(f"neither a model nor an adapter that emomerge reads: a {family.name}", where=where, fix=family.fix)
