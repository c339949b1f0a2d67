"""The table of PEFT's types of adapters: how each is read, or why it cannot be.

An addition is one file in `kinds` and one entry here, or only an entry for a type that goes through PEFT's own layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from emomerge.adapters.peft.kind import Kind

_KINDS = "emomerge.adapters.peft.kinds"
FORMULAS: Mapping[str, str] = MappingProxyType(
    {
        "ADALORA": f"{_KINDS}.adalora:ADALORA",
        "BOFT": f"{_KINDS}.oft:BOFT",
        "BONE": f"{_KINDS}.miss:BONE",
        "FOURIERFT": f"{_KINDS}.fourierft:FOURIERFT",
        "HRA": f"{_KINDS}.hra:HRA",
        "IA3": f"{_KINDS}.ia3:IA3",
        "LN_TUNING": f"{_KINDS}.tokens:LN_TUNING",
        "LOHA": f"{_KINDS}.lycoris:LOHA",
        "LOKR": f"{_KINDS}.lycoris:LOKR",
        "MISS": f"{_KINDS}.miss:MISS",
        "OFT": f"{_KINDS}.oft:OFT",
        "RANDLORA": f"{_KINDS}.shared:RANDLORA",
        "TRAINABLE_TOKENS": f"{_KINDS}.tokens:TRAINABLE_TOKENS",
        "VERA": f"{_KINDS}.shared:VERA",
    }
)
"""`peft_type` → "module:Kind" of a type with an explicit formula. LORA has a reader of its own."""


class Live(NamedTuple):
    """A type that PEFT's own layer merges.

    Args:
        name: as its users call it.
        prefix: of the names of its tensors.
    """

    name: str
    prefix: str


LIVE: Mapping[str, Live] = MappingProxyType(
    {
        "C3A": Live("C³A", "c3a_"),
        "DEFT": Live("DEFT", "deft_"),
        "DELORA": Live("DeLoRA", "delora_"),
        "GLORA": Live("GLoRA", "glora_"),
        "GRALORA": Live("GraLoRA", "gralora_"),
        "HIRA": Live("HiRA", "hira_"),
        "ROAD": Live("RoAd", "road_"),
        "SHIRA": Live("SHiRA", "shira_"),
        "VBLORA": Live("VB-LoRA", "vblora_"),
        "WAVEFT": Live("WaveFT", "waveft_"),
    }
)
"""`peft_type` → a type that needs PEFT installed."""

_PROMPT = "it is a prompt: it adds to the input of the model or of its layers, and changes no weight"
_SERVE = "use it through PEFT"
_OWN = "the model with it is not of the base's architecture: no weights of the base have its effect"


class Refused(NamedTuple):
    """A type that cannot be baked, and what to do with such an adapter."""

    reason: str
    fix: str = _SERVE


REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "ADAPTION_PROMPT": Refused(_PROMPT),
        "CARTRIDGE": Refused(_PROMPT),
        "CPT": Refused(_PROMPT),
        "MULTITASK_PROMPT_TUNING": Refused(_PROMPT),
        "PREFIX_TUNING": Refused(_PROMPT),
        "PROMPT_TUNING": Refused(_PROMPT),
        "P_TUNING": Refused(_PROMPT),
        "PEANUT": Refused(_OWN),
        "POLY": Refused("which of its factors apply depends on the task of each example"),
        "SHADOW": Refused(_OWN),
        "XLORA": Refused("which of its adapters apply depends on each token"),
    }
)
"""`peft_type` → why no weights have the effect of such an adapter."""


def kind_of(peft_type: str) -> Kind:
    """Return the kind of a type in FORMULAS."""
    module, _, name = FORMULAS[peft_type].partition(":")
    return cast("Kind", cast(Any, getattr(import_module(module), name)))
