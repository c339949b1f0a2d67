"""Which program wrote an adapter file, and for which family of models: from its metadata and names, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MUSUBI = re.compile(
    r"networks\.(lora|loha|lokr)_(wan|framepack|fpack|qwen_image|zimage|flux_2|kandinsky5?|hv|hunyuan_video).*"
)
_BY_METADATA = (
    ("OneTrainer", lambda metadata: any(key.startswith("ot_") for key in metadata)),
    ("ai-toolkit", lambda metadata: "ai-toolkit" in metadata.get("software", "")),
    ("LyCORIS", lambda metadata: "lycoris" in metadata.get("ss_network_module", "")),
    ("musubi-tuner", lambda metadata: _MUSUBI.fullmatch(metadata.get("ss_network_module", ""))),
    ("sd-scripts", lambda metadata: metadata.get("ss_network_module")),
    ("diffusers", lambda metadata: "lora_adapter_metadata" in metadata),
)
_BY_NAMES = (
    ("OneTrainer", re.compile(r"bundle_emb\..+|lora_(transformer|prior_unet)_.+|(clip_[lg]|t5|llama)\..+")),
    ("XLabs", re.compile(r".+\.processor\.(qkv|proj)_lora\d?\..+")),
    ("VideoX-Fun", re.compile(r"lora_unet__.+")),
    ("LyCORIS or SimpleTuner", re.compile(r"lycoris_.+")),
    ("SimpleTuner", re.compile(r"(unet|transformer)\.base_model\.model\..+")),
    ("diffusers before 0.22", re.compile(r".+\.processor\.to_\w+_lora\..+|.+\.lora_linear_layer\..+")),
    (
        "musubi-tuner or compatible",
        re.compile(r"lora_unet_(blocks_\d+_(self_attn|cross_attn|ffn)|(double|single)_blocks_\d+_(\w+_mlp_fc\d|\w*mod\w*_linear)).*"),
    ),
    ("sd-scripts or compatible", re.compile(r"(lora|oft)_(unet|te\d?)_.+")),
    ("diffusers or PEFT", re.compile(r"base_model\.model\..+|(unet|transformer|text_conditioner|text_encoder(_\d)?)\..+")),
    ("ai-toolkit or ComfyUI", re.compile(r"(diffusion_model|model\.diffusion_model|text_encoders)\..+")),
    ("ComfyUI or compatible", re.compile(r"(single_transformer_blocks|\w*blocks|layers|\w+_refiner|middle_block)\.\d.+")),
)  # fmt: skip
"""Trainer → names that only its files have; the first that any name matches."""


def trainer_of(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Return the program that wrote a file, as far as its metadata and names tell."""
    if found := next((trainer for trainer, holds in _BY_METADATA if holds(metadata)), None):
        return found
    names = tuple(names)
    return next((trainer for trainer, pattern in _BY_NAMES if any(pattern.fullmatch(name) for name in names)), None)


_UNET = re.compile(r"(input|output|down|up)_blocks?_\d|middle_block|mid_block")
_SDXL = re.compile(r"input_blocks_[78]_1_|transformer_blocks_[2-9]_attn|down_blocks_2_attentions_\d_transformer_blocks_1_|te2_")
_FAMILIES = (
    ("Flux.2", re.compile(r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?_linear_(in|out)")),
    ("HunyuanVideo", re.compile(
        r"individual_token_refiner|refiner_blocks|(img|txt)_mlp_fc[12]|_mod_linear|modulation_linear|double_blocks_19_")),
    ("Flux.1 or similar", re.compile(r"double_blocks_|single_blocks_|single_transformer_blocks_")),
    ("SD3", re.compile(r"joint_blocks_")),
    ("Anima", re.compile(r"llm_adapter_|blocks_\d+_(self|cross)_attn_\w+_proj|adaln_modulation|blocks_\d+_norm\d_linear_\d")),
    ("Wan", re.compile(r"blocks_\d+_(self_attn|cross_attn)_[qkvo](_|$)|blocks_\d+_ffn_")),
    ("Qwen-Image", re.compile(r"transformer_blocks_\d+_(img|txt)_(mlp|mod)")),
    ("Z-Image or Lumina 2", re.compile(r"(layers|noise_refiner|context_refiner)_\d+_(attention|attn|feed_forward)")),
    ("Flux.1, SD3 or similar", re.compile(r"transformer_blocks_\d+_")),
)  # fmt: skip


def family_of(names: Iterable[str]) -> str | None:
    """Return the family of models that an adapter is for, from the names of its modules; None if they do not tell."""
    flat = [name.replace(".", "_") for name in names]
    if any(_UNET.search(name) for name in flat):
        return "SDXL" if any(_SDXL.search(name) for name in flat) else "SD1.5 or SD2"
    return next((family for family, pattern in _FAMILIES if any(pattern.search(name) for name in flat)), None)
