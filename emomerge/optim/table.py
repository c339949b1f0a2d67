"""The table of optimizers: what the rest of the package needs to know about each one, readable without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emomerge.optim.base import EmoOptimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """The facts about one optimizer."""

    path: str
    """`module:Class`, a subclass of `EmoOptimizer`; imported by `load`."""
    description: str
    """One line: the type of the rule and what it is based on."""
    source: str
    """Paper, chapter or section."""
    state: str
    """State per parameter tensor."""
    options: tuple[str, ...] = ()
    """Fields of a recipe's `runs` that it takes besides those common to all optimizers."""
    squared_gradients: str | None = None
    """Key of a state tensor in the parameter's shape that holds the EMA of squared gradients, without bias correction."""
    default: bool = False
    """Whether recipes that list no optimizers train it."""

    @property
    def class_name(self) -> str:
        """Return the name of the class, such as `EmoSens`."""
        return self.path.partition(":")[2]

    def load(self) -> type[EmoOptimizer]:
        """Import and return the class."""
        module, _, name = self.path.partition(":")
        loaded: type[EmoOptimizer] = getattr(import_module(module), name)
        return loaded


OPTIMIZERS: Mapping[str, OptimizerEntry] = MappingProxyType(
    {
        "sens": OptimizerEntry(
            path="emomerge.optim.sens:EmoSens",
            description="Adam type: two moments, no bias correction",
            source="emo paper, chapter 4",
            state="two tensors",
            squared_gradients="v",
            default=True,
        ),
        "airy": OptimizerEntry(
            path="emomerge.optim.airy:EmoAiry",
            description="Adafactor type: a second moment factored into rows and columns, sign step",
            source="emo paper, chapter 5",
            state="one row and one column",
            default=True,
        ),
        "cats": OptimizerEntry(
            path="emomerge.optim.cats:EmoCats",
            description="Lion type: the sign of a blend of momentum and gradient",
            source="emo paper, chapter 5",
            state="one tensor",
            default=True,
        ),
        "tion": OptimizerEntry(
            path="emomerge.optim.tion:EmoTion",
            description="W-Ref geometry: the sign of a momentum that weights each gradient by its freshness",
            source="emo paper, section 6.2",
            state="one tensor and one number",
            options=("geometry",),
            default=True,
        ),
        "void": OptimizerEntry(
            path="emomerge.optim.void:EmoVoid",
            description="W-Ref geometry without moments: a sign step, shortened where the gradient is parallel to the weights",
            source="emo paper, section 6.3",
            state="none",
            options=("geometry",),
            default=True,
        ),
    }
)
"""Every optimizer by the name that recipes and the command line use."""


def known_names(unknown: str) -> str:
    """Return the text of an error about an unknown name: the known names and the nearest one."""
    near = difflib.get_close_matches(unknown, OPTIMIZERS, n=1)
    return " | ".join(OPTIMIZERS) + (f" (did you mean `{near[0]}`?)" if near else "")
