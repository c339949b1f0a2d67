"""The recipe: everything `emomerge run` does, from the base to the report, as one frozen object read from YAML.

Importing this package does not import torch. Parsing a recipe imports the module of its task, which does.
"""

from emomerge.recipe.loading import load_recipe, parse_recipe
from emomerge.recipe.sections import (
    FAMILY,
    Adapter,
    Base,
    DataSection,
    Ema,
    Find,
    Full,
    Lawa,
    Lora,
    Merge,
    Outer,
    Place,
    Prepare,
    Probe,
    Recipe,
    Rival,
    Runs,
    Section,
    TaskSection,
    Transform,
    located_files,
)

__all__ = [
    "FAMILY",
    "Adapter",
    "Base",
    "DataSection",
    "Ema",
    "Find",
    "Full",
    "Lawa",
    "Lora",
    "Merge",
    "Outer",
    "Place",
    "Prepare",
    "Probe",
    "Recipe",
    "Rival",
    "Runs",
    "Section",
    "TaskSection",
    "Transform",
    "load_recipe",
    "located_files",
    "parse_recipe",
]
