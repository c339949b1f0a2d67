"""The emo optimizers: five update rules whose learning rate, emoPulse, follows the loss.

Names are imported when they are first used, so that the table of optimizers can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emomerge.optim.table import OPTIMIZERS as OPTIMIZERS

if TYPE_CHECKING:
    from emomerge.optim.airy import EmoAiry as EmoAiry
    from emomerge.optim.base import EmoOptimizer as EmoOptimizer
    from emomerge.optim.cats import EmoCats as EmoCats
    from emomerge.optim.geometry import geom_relation as geom_relation
    from emomerge.optim.pulse import EmoPulse as EmoPulse
    from emomerge.optim.scheduler import EmoPulseLR as EmoPulseLR
    from emomerge.optim.sens import EmoSens as EmoSens
    from emomerge.optim.size import weight_size as weight_size
    from emomerge.optim.tion import EmoTion as EmoTion
    from emomerge.optim.trace import PulseTrace as PulseTrace
    from emomerge.optim.void import EmoVoid as EmoVoid

_MODULES = {
    **{entry.class_name: entry.path.partition(":")[0] for entry in OPTIMIZERS.values()},
    "EmoOptimizer": "emomerge.optim.base",
    "EmoPulse": "emomerge.optim.pulse",
    "EmoPulseLR": "emomerge.optim.scheduler",
    "PulseTrace": "emomerge.optim.trace",
    "geom_relation": "emomerge.optim.geometry",
    "weight_size": "emomerge.optim.size",
}
__all__ = ["OPTIMIZERS", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'emomerge.optim' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
