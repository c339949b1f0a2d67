"""Adapters: their exact effect on each base tensor, computed on demand.

Names are imported on first use, so that `adapters.formats` can be used before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.adapters.baked import BakedCheckpoint as BakedCheckpoint
    from emomerge.adapters.change import Change as Change
    from emomerge.adapters.combined import CombinedCheckpoint as CombinedCheckpoint
    from emomerge.adapters.combined import Strong as Strong
    from emomerge.adapters.formats import format_of as format_of
    from emomerge.adapters.formats import is_adapter as is_adapter
    from emomerge.adapters.run import artefact_of as artefact_of
    from emomerge.adapters.run import bake as bake
    from emomerge.adapters.run import bake_several as bake_several
    from emomerge.adapters.run import input_files as input_files
    from emomerge.adapters.run import open_dense as open_dense
    from emomerge.adapters.run import open_run as open_run

_MODULES = {
    "BakedCheckpoint": "baked",
    "Change": "change",
    "CombinedCheckpoint": "combined",
    "Strong": "combined",
    "artefact_of": "run",
    "bake": "run",
    "bake_several": "run",
    "format_of": "formats",
    "input_files": "run",
    "is_adapter": "formats",
    "open_dense": "run",
    "open_run": "run",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
