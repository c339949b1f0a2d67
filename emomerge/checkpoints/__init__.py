"""Reading and writing weights, tensor by tensor."""

from emomerge.checkpoints.atomic import new_folder, replace, sha256, write_json, write_text
from emomerge.checkpoints.checkpoint import (
    Checkpoint,
    MemoryCheckpoint,
    OnDevice,
    RoundingLoss,
    StoredFile,
    TensorInfo,
    all_finite,
    working_dtype,
)
from emomerge.checkpoints.metadata import kept_metadata, made_of
from emomerge.checkpoints.names import Layout, Piece, disk_names, load_into, model_checkpoint, on_disk
from emomerge.checkpoints.native import rounded_sum
from emomerge.checkpoints.reader import open_checkpoint
from emomerge.checkpoints.writer import SideFile, write_checkpoint
from emomerge.numerics.rounding import Rounding
from emomerge.watch import watched_inputs

__all__ = [
    "Checkpoint",
    "Layout",
    "MemoryCheckpoint",
    "OnDevice",
    "Piece",
    "Rounding",
    "RoundingLoss",
    "SideFile",
    "StoredFile",
    "TensorInfo",
    "all_finite",
    "disk_names",
    "kept_metadata",
    "load_into",
    "made_of",
    "model_checkpoint",
    "new_folder",
    "on_disk",
    "open_checkpoint",
    "replace",
    "rounded_sum",
    "sha256",
    "watched_inputs",
    "working_dtype",
    "write_checkpoint",
    "write_json",
    "write_text",
]
