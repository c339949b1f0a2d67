"""AdaLoRA: LoRA in the form of a singular value decomposition, with the ranks that training left (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emomerge.adapters.formulas.formula import Formula
from emomerge.adapters.formulas.lora import LowRankProduct
from emomerge.adapters.peft.kind import Count, Kind, Module, Number, Settings


class AdaLoraSettings(Settings):
    """The scale α/(r₀ + 10⁻⁵) with the rank at the start of training."""

    init_r: Count
    lora_alpha: Number
    rank_pattern: dict[str, list[Any]] | None = None


_EPSILON = 1e-5
"""What PEFT adds to the rank when it divides by it."""
_TRAINING = frozenset(
    """
    alpha_pattern beta1 beta2 deltaT init_lora_weights layer_replication lora_bias lora_dropout megatron_core
    orth_reg_weight peft_type qalora_group_size r target_r tfinal tinit total_step use_rslora
    """.split()  # noqa: SIM905
)


def _adalora(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2, 4)
    a = module.take("lora_A", None, module.columns)
    values, b = module.take("lora_E", len(a), 1), module.take("lora_B", module.out, len(a))
    for name, kept in (module.setting("rank_pattern") or {}).items():
        if name.removesuffix(".lora_E") == module.name:
            module.require_rank(len(a), sum(map(bool, kept)), "lora_A")
    start = module.setting("init_r")
    rank = float(module.take("ranknum", 1)) if module.has("ranknum") else float(start)
    alpha = float(module.setting("lora_alpha"))
    return {"weight": LowRankProduct(b, a.double() * values.double(), (alpha or float(len(a))) / (rank + _EPSILON))}


ADALORA = Kind("AdaLoRA", ("lora_A", "lora_B", "lora_E", "ranknum"), _adalora, AdaLoraSettings, _TRAINING, conv1d=True)
