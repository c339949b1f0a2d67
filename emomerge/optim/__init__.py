"""The emo optimizers: five update rules whose learning rate, emoPulse, follows the loss."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from emomerge.optim.airy import EmoAiry
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.cats import EmoCats
from emomerge.optim.geometry import geom_relation
from emomerge.optim.pulse import EmoPulse
from emomerge.optim.scheduler import EmoPulseLR
from emomerge.optim.sens import EmoSens
from emomerge.optim.tion import EmoTion
from emomerge.optim.trace import PulseTrace
from emomerge.optim.void import EmoVoid

__all__ = [
    "OPTIMIZERS",
    "EmoAiry",
    "EmoCats",
    "EmoPulse",
    "EmoPulseLR",
    "EmoSens",
    "EmoTion",
    "EmoVoid",
    "PulseTrace",
    "geom_relation",
]

OPTIMIZERS: Mapping[str, type[EmoOptimizer]] = MappingProxyType(
    {"sens": EmoSens, "airy": EmoAiry, "cats": EmoCats, "tion": EmoTion, "void": EmoVoid}
)
"""The family by the names that recipes and the command line use."""
