"""The configuration of a PEFT adapter: which type it is, and whether its effect is known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emomerge.adapters.peft.files import CONFIG, load_config
from emomerge.adapters.peft.kind import TRAINING_ONLY, Settings
from emomerge.adapters.peft.lora import LoraSettings
from emomerge.adapters.peft.types import FORMULAS, LIVE, REFUSED, kind_of
from emomerge.errors import BadInput
from emomerge.files import check_type

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initializations of LoRA that leave the base unchanged."""
_INIT_FIX = (
    "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…); or give the base as it was saved "
    "after the initialization, and set init_lora_weights to true"
)
_LORA_TRAINING = frozenset(
    """
    corda_config eva_config init_lora_weights loftq_config lora_bias lora_dropout lora_ga_config megatron_core
    qalora_group_size
    """.split()  # noqa: SIM905
)
_LORA_REFUSED = {
    "alora_invocation_tokens": (
        "an activated LoRA acts only on tokens behind its invocation: no weights have that effect", "use it through PEFT",
    ),
    "arrow_config": ("which of the LoRAs apply depends on each token: no weights have that effect", "use it through PEFT"),
    "layer_replication": (
        "the adapter is for a model with more layers than the base",
        "copy the repeated layers into a base with that many layers, and remove layer_replication",
    ),
    "megatron_config": ("a LoRA of Megatron's parallel layers holds only a shard of each factor", "use it through PEFT"),
    "use_qalora": ("a QALoRA was trained to mend the errors of a quantized base", "use it through PEFT"),
}  # fmt: skip
"""Options of LoRA that no weights of the base can have, and what to do."""


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of an adapter, after checking that its effect on the weights of a base is known exactly.

    Raises:
        BadInput: it is not JSON, or a field says that the adapter has another effect.
    """
    path, config = folder / CONFIG, load_config(folder)
    kind = config.get("peft_type")
    if "peft_type" not in config:
        raise BadInput("not a PEFT configuration", where=path, expected="peft_type")
    if isinstance(kind, str) and kind in REFUSED:
        refused = REFUSED[kind]
        raise BadInput(
            "this kind of adapter cannot be baked",
            where=f"{path}, peft_type",
            found=f"{kind}: {refused.reason}",
            fix=refused.fix,
        )
    if kind == "LORA":
        _check_lora(config, path)
        return config
    if isinstance(kind, str) and kind in LIVE:
        return config  # which PEFT checks
    if not isinstance(kind, str) or kind not in FORMULAS:
        known = ", ".join(sorted({"LORA", *FORMULAS, *LIVE}))
        raise BadInput(
            "this kind of adapter is not supported", where=f"{path}, peft_type", expected=known, found=kind,
            fix="merge it in PEFT with merge_and_unload, and give the model that this makes",
        )  # fmt: skip
    known_kind = kind_of(kind)
    _check(config, known_kind.settings, known_kind.fields, path, known_kind.name)
    return config


def _check_lora(config: Mapping[str, Any], path: Path) -> None:
    if config.get("init_lora_weights", True) not in _INITS:
        raise BadInput(
            "this initialization changed the base", where=f"{path}, init_lora_weights", found=config["init_lora_weights"],
            fix=_INIT_FIX,
        )  # fmt: skip
    for field in _LORA_REFUSED:
        if config.get(field):
            reason, fix = _LORA_REFUSED[field]
            raise BadInput(reason, where=f"{path}, {field}", found=config[field], fix=fix)
    _check(config, LoraSettings, TRAINING_ONLY | frozenset(LoraSettings.model_fields) | _LORA_TRAINING, path, "LoRA")


def _check(config: Mapping[str, Any], settings: type[Settings], fields: frozenset[str], path: Path, name: str) -> None:
    """Raise BadInput for a value of a wrong type, and for a field that is set and would change the formula."""
    check_type(config, settings, where=path, what="a wrong value in the adapter's configuration")
    for field, value in config.items():
        if value and field not in fields:
            raise BadInput(f"this kind of {name} is not supported", where=f"{path}, {field}", found=value)
