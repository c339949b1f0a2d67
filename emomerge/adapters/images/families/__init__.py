"""The families of models, each with a table of names between its layouts. A new family is one module and one entry here."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.families import anima, clip, flux, hunyuan, qwen, sd3, unet, wan, zimage
from emomerge.adapters.images.layouts import Family

DENOISERS: tuple[Family, ...] = (
    *unet.FAMILIES, *sd3.FAMILIES, *hunyuan.FAMILIES, *flux.FAMILIES, *zimage.FAMILIES, *wan.FAMILIES, *qwen.FAMILIES,
    *anima.FAMILIES,
)  # fmt: skip
"""The first family that has the names of a base is taken."""
TEXT_ENCODERS: tuple[Family, ...] = clip.FAMILIES


def family_of(names: Iterable[str], families: tuple[Family, ...] = DENOISERS) -> Family | None:
    """Return the family that tensor names belong to, None if it is unknown."""
    names = tuple(names)
    return next((family for family in families if family.has(names)), None)
