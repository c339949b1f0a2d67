"""Merge several runs over one base into one model: `merge` streams tensors through a merge method."""

from emomerge.merging import methods  # noqa: F401  (registers them)
from emomerge.merging.engine import MergedCheckpoint, merge
from emomerge.merging.lora import truncate
from emomerge.merging.masks import mask_files, reconstruct
from emomerge.merging.registry import METHODS, MergeMethod, check_params, find_method, merge_method

__all__ = [
    "METHODS",
    "MergeMethod",
    "MergedCheckpoint",
    "check_params",
    "find_method",
    "mask_files",
    "merge",
    "merge_method",
    "reconstruct",
    "truncate",
]
