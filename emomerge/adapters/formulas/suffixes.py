"""The ends of adapter keys, which say what a tensor is; without torch."""

from __future__ import annotations

import re

_SPELLINGS = {
    "lora_down": ("lora_down.weight", "lora_A.weight", "lora_A", "lora.down.weight", "lora_linear_layer.down.weight"),
    "lora_up": ("lora_up.weight", "lora_B.weight", "lora_B", "lora.up.weight", "lora_linear_layer.up.weight"),
    "lora_mid": ("lora_mid.weight",),
    "lora_up.bias": ("lora_up.bias", "lora_B.bias"),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "a1": ("a1.weight",),
    "a2": ("a2.weight",),
    "b1": ("b1.weight",),
    "b2": ("b2.weight",),
    "bm": ("bm.weight",),
    "oft_R": ("oft_R.weight", "oft_R"),
}
"""Canonical suffix → the spellings that writers use for it."""
_AS_WRITTEN = """
    alpha dora_scale scalar
    hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2
    lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t1 lokr_t2
    oft_blocks oft_diag rescale weight on_input w_norm b_norm diff diff_b diff_m set_weight reshape_weight
    bias_indices bias_values bias_size
""".split()  # noqa: SIM905
SUFFIXES = frozenset(_SPELLINGS) | frozenset(_AS_WRITTEN)
"""All canonical suffixes, beside `oft_blocks.0`, `oft_blocks.1`, …"""

_CANONICAL = {spelling: suffix for suffix, spellings in _SPELLINGS.items() for spelling in spellings}
_CANONICAL |= {suffix: suffix for suffix in _AS_WRITTEN}
_KEY = re.compile(
    rf"(.+?)\.({'|'.join(re.escape(spelling) for spelling in sorted(_CANONICAL, key=len, reverse=True))}|oft_blocks\.\d+)"
)
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(up|down)\.weight")
# XLabs: the processors of Flux's blocks; 1 is the image and 2 the text. In a single block, `qkv` is the first part of linear1.
_XLABS = re.compile(r"(.*\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(up|down)\.weight")
_ADAPTER_NAME = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|oft_R))\.default(?=$|\.weight$|\.bias$)")


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key of an adapter into the module and the canonical suffix; None if the suffix is unknown.

    >>> split_key("unet.conv_in.lora_A.default.weight")
    ('unet.conv_in', 'lora_down')
    >>> split_key("unet.mid.attn1.processor.to_out_lora.up.weight")
    ('unet.mid.attn1.to_out.0', 'lora_up')
    """
    if match := _PROCESSOR.fullmatch(key):  # diffusers up to 0.21: the attention processor held the factors
        projection = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{projection}", f"lora_{match[3]}"
    if (match := _XLABS.fullmatch(key)) and (match[2] == "double") == bool(match[5]):
        block = f"{match[1] or ''}{match[2]}_blocks.{match[3]}"
        if match[2] == "single":
            return f"{block}.{'linear2' if match[4] == 'proj' else 'linear1_qkv'}", f"lora_{match[6]}"
        return f"{block}.{'img' if match[5] == '1' else 'txt'}_attn.{match[4]}", f"lora_{match[6]}"
    match = _KEY.fullmatch(_ADAPTER_NAME.sub(r"\1", key))
    return (match[1], _CANONICAL.get(match[2], match[2])) if match else None
