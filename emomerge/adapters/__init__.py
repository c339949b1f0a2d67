"""Adapters: what they do to each tensor of their base, exactly, computed when it is asked for."""

from emomerge.adapters.bake import BakedCheckpoint, bake
from emomerge.adapters.run import open_run

__all__ = ["BakedCheckpoint", "bake", "open_run"]
