"""Models with one layout: Qwen-Image."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule


def _none(_: Iterable[str]) -> list[Rule]:
    return []


FAMILIES = (Family("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight",), _none),)
