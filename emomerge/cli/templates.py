"""The recipes that ship with emomerge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.recipe import Recipe


def templates() -> dict[str, Path]:
    """Return the bundled recipes, name → file, from the package or, in a checkout, from the folder next to it."""
    package = Path(__file__).parents[1]
    folders = [package / "recipes", package.parent / "recipes"]
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def template_file(name: str) -> Path:
    """Return the file of a bundled recipe.

    Raises:
        BadInput: there is no recipe of that name.
    """
    known = templates()
    if name not in known:
        raise BadInput("no such recipe comes with emomerge", found=name, expected=", ".join(sorted(known)))
    return known[name]


def open_recipe(recipe: str, overrides: Sequence[str]) -> Recipe:
    """Read a recipe from a file, or a bundled one by its name.

    Raises:
        BadInput: see `load_recipe`.
    """
    from emomerge.recipe import load_recipe  # not for `--help`: building the schema takes a quarter of a second

    known = templates()
    path = known[recipe] if recipe in known and not Path(recipe).is_file() else Path(recipe)
    return load_recipe(path, overrides)
