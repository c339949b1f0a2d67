"""The arithmetic of single-file adapters (kohya, LyCORIS, diffusers, ComfyUI): what the tensors of a module do to it.

`split_key` takes a key of the file apart, `module_of` turns the tensors of one module into formulas. Which module of which base
a key means, and the layout of that base, are the business of the format that calls them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emomerge.adapters.formulas.suffixes import SUFFIXES, split_key

if TYPE_CHECKING:
    from emomerge.adapters.formulas.formula import Formula
    from emomerge.adapters.formulas.module import ModuleChange, module_of

__all__ = ["SUFFIXES", "Formula", "ModuleChange", "module_of", "split_key"]

_HOMES = {"Formula": "formula", "ModuleChange": "module", "module_of": "module"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
