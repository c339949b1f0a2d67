"""Train five short runs with loss-driven learning rates, merge them into one model, and measure what that brings.

    import emomerge
    base = emomerge.open_checkpoint("base")
    baked = emomerge.bake(base, "runs/sens-0")
    merged = emomerge.merge(base, ["runs/sens-0", "runs/cats-0"], method="ties", density=0.2)
    emomerge.write_checkpoint(merged, "out", dtype="bfloat16")

Names are imported when they are first used, so that `import emomerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.adapters import bake as bake
    from emomerge.checkpoints import open_checkpoint as open_checkpoint
    from emomerge.checkpoints import write_checkpoint as write_checkpoint
    from emomerge.merging import merge as merge
    from emomerge.probing import probe as probe

_HOMES = {
    "open_checkpoint": "emomerge.checkpoints",
    "write_checkpoint": "emomerge.checkpoints",
    "bake": "emomerge.adapters",
    "merge": "emomerge.merging",
    "probe": "emomerge.probing",
}
__all__ = ["bake", "merge", "open_checkpoint", "probe", "write_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emomerge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
