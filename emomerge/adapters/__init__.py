"""Adapters: what they do to each tensor of their base, exactly, computed when it is asked for."""

from emomerge.adapters.bake import BakedCheckpoint, artefact_of, bake
from emomerge.adapters.run import open_run

__all__ = ["BakedCheckpoint", "artefact_of", "bake", "open_run"]
