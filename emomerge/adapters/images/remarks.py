"""What a user should know about an adapter file whose metadata do not agree with its tensors; it is baked as it stands."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

_SPLIT = re.compile(r'"?split_qkv"?\s*[:=]\s*"?true', re.IGNORECASE)
_FUSED = ("_qkv", "_linear1")


def remarks(tensors: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> list[str]:
    """Return a sentence for each disagreement.

    Args:
        tensors: module → canonical suffix → tensor.
        metadata: of the header.
    """
    trained = metadata.get("ss_network_dim", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", trained):
        return []
    rank = int(trained)
    return [
        *(_split_attention(tensors, rank) if _SPLIT.search(metadata.get("ss_network_args", "")) else []),
        *_alphas_without_rank(tensors, rank),
    ]


def _split_attention(tensors: Mapping[str, Mapping[str, Tensor]], rank: int) -> list[str]:
    """Return the remark on `split_qkv` of sd-scripts: the factors of q, k and v side by side have 3r rows, α belongs to r."""
    ranks = {name: len(module["lora_down"]) for name, module in tensors.items() if "lora_down" in module}
    weak = sum(name.endswith(_FUSED) and found in (3 * rank, 4 * rank) for name, found in ranks.items())
    if not weak:
        return []
    return [
        f"sd-scripts saved {weak} fused modules (split_qkv) with 3 or 4 times the rank of training and an unchanged alpha, so"
        " that they act 3 or 4 times weaker than in training; they are taken as the file says, as elsewhere"
    ]


def _alphas_without_rank(tensors: Mapping[str, Mapping[str, Tensor]], rank: int) -> list[str]:
    """Return the remark on LoKr with two whole matrices, which have no rank by which α could be divided."""
    whole = [module for module in tensors.values() if {"lokr_w1", "lokr_w2", "alpha"} <= module.keys()]
    alphas = {float(module["alpha"]) for module in whole if module["alpha"].numel() == 1}
    odd = sorted(alpha for alpha in alphas if 0 < alpha < math.inf and alpha != rank and alpha < 1e6)
    if not odd:
        return []
    return [
        f"LoKr modules of whole matrices with alpha {odd[0]:g} in a file of dimension {rank}: alpha has no meaning, and the"
        f" scale is taken as 1, as in LyCORIS; a program that divides alpha by {rank} scales them by {odd[0] / rank:g}"
    ]
