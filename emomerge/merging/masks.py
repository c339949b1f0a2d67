"""Runs compressed to masks: one reference for all runs, one bit per weight for each (TALL-masks, Wang et al. 2024).

    θ̂_t = θ₀ + mask_t ⊙ R

R cannot be derived from the merge, so it is stored as well. N runs take 4 + N/8 bytes per moved weight; N dense copies in 16
bits take 2N bytes per weight. Both files go into a subfolder, since some loaders read every .safetensors file of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emomerge.checkpoints import Checkpoint, SideFile, TensorInfo, open_checkpoint, working_dtype
from emomerge.checkpoints.reader import read_header
from emomerge.errors import BadInput
from emomerge.files import parse_json
from emomerge.merging.buffers import is_statistic
from emomerge.merging.engine import MergedCheckpoint
from emomerge.merging.registry import METHODS, MergeMethod, select
from emomerge.merging.vectors import CHUNK, Candidate

MASKS = "masks/masks.safetensors"
"""For each tensor that a run moved: uint8 (runs, ⌈n/8⌉); bit i of byte j belongs to element 8j + i of the flat tensor."""
REFERENCE = "masks/reference.safetensors"
"""R of the same tensors, in float32 (float64 for tensors that are float64 in the base)."""

Compute = Callable[[str], Tensor]


def require_masks(method: MergeMethod) -> None:
    """Raise BadInput if a method has no per-run masks."""
    if method.localize is None:
        having = ", ".join(sorted(name for name, some in METHODS.items() if some.localize))
        raise BadInput("this method has no masks of single runs to save", found=method.name, expected=having)


def mask_files(merged: MergedCheckpoint) -> dict[str, SideFile]:
    """Return the files that `write_checkpoint` adds to a merge so that `reconstruct` can restore each run.

    The metadata are `runs`, a JSON list of their names; the options that determine the masks; and `bits`, the bit order
    within a byte. Tensors are computed when they are written.

    Raises:
        BadInput: the method has no per-run masks.
    """
    require_masks(merged.method)
    chosen = select(merged.method.localize or mask_files, merged.options)
    metadata = {"runs": json.dumps(merged.runs), **chosen, "bits": "little"}

    def packed_info(name: str) -> TensorInfo:
        return TensorInfo(torch.uint8, (len(merged.runs), -(-merged.info(name).numel // 8)))

    def reference_info(name: str) -> TensorInfo:
        info = merged.info(name)
        return TensorInfo(working_dtype(info.dtype), info.shape)

    def packed(name: str) -> Tensor:
        return torch.cat([pack(masks) for _, masks in localized(merged, name)], dim=1)

    def whole_reference(name: str) -> Tensor:
        return torch.cat([r for r, _ in localized(merged, name)]).view(merged.info(name).shape)

    masks, references = _Computed(merged, packed_info, packed), _Computed(merged, reference_info, whole_reference)
    return {MASKS: SideFile(masks, metadata), REFERENCE: SideFile(references, metadata)}


def localized(merged: MergedCheckpoint, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield R (n,) and the masks (runs, n) of the pieces of a tensor that moved; n is a multiple of 8 except in the last."""
    localize = merged.method.localize
    assert localize is not None, "call `require_masks` first"
    if is_statistic(name) and (mean := merged.tau(name)) is not None:  # one mean for all runs, as in the merge
        yield mean.flatten(), torch.ones(len(merged.runs), mean.numel(), dtype=torch.bool)
        return
    arguments = merged.arguments(name)
    for deltas in arguments["deltas"].split(CHUNK, dim=1):
        yield localize(**select(localize, arguments | {"deltas": deltas}))


def reconstruct(folder: Path, run: str, base: Checkpoint) -> Candidate:
    """Return θ₀ + mask_t ⊙ R, lazily.

    Args:
        folder: a merge with saved masks.
        run: the run's name, or the last part of its path if that is unique.
        base: θ₀.

    Raises:
        BadInput: the folder has no masks, or none of that run.
    """
    for file in (MASKS, REFERENCE):
        if not (folder / file).is_file():
            raise BadInput("no masks in this folder", where=folder / file, fix="merge with --save-masks")
    masks, references = open_checkpoint(folder / MASKS), open_checkpoint(folder / REFERENCE)
    written = read_header(folder / MASKS).metadata.get("runs", "[]")
    runs = parse_json(written, list[str], where=f"{folder / MASKS}, runs", what="not a list of runs")
    index = find_run(run, runs)
    for name in masks:
        _check_fit(folder, name, len(runs), masks, references, base)

    def tau(name: str) -> Tensor | None:
        if name not in masks:
            return None
        r = references[name]
        return torch.where(unpack(masks[name][index], r.numel()).view(r.shape), r, 0)

    return Candidate(base, tau)


def _check_fit(folder: Path, name: str, runs: int, masks: Checkpoint, references: Checkpoint, base: Checkpoint) -> None:
    """Raise BadInput if a tensor's masks or reference do not fit the base."""
    where = f"{folder / MASKS}, {name}"
    if name not in references or name not in base:
        raise BadInput("masks of a tensor without reference or base", where=where)
    info = base.info(name)
    wanted = TensorInfo(torch.uint8, (runs, -(-info.numel // 8))), TensorInfo(working_dtype(info.dtype), info.shape)
    found = masks.info(name), references.info(name)
    if found != wanted:
        raise BadInput("masks or reference do not fit the base", where=where, expected=wanted, found=found)


def find_run(run: str, names: Sequence[str]) -> int:
    """Return the index of a run among the names. Raises BadInput if there is none, or more than one."""
    found = [i for i, name in enumerate(names) if name == run] or [i for i, n in enumerate(names) if Path(n).name == run]
    if len(found) != 1:
        raise BadInput("no such run in this merge", found=run, expected=", ".join(names))
    return found[0]


def pack(masks: Tensor) -> Tensor:
    """Pack booleans (runs, n) into bytes (runs, ⌈n/8⌉)."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: Tensor, n: int) -> Tensor:
    """Unpack booleans (n,) from bytes (⌈n/8⌉,)."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little")).bool()


class _Computed(Checkpoint):
    """A tensor computed on reading for each tensor that the merge's runs moved."""

    def __init__(self, merged: MergedCheckpoint, info: Callable[[str], TensorInfo], compute: Compute) -> None:
        self._merged, self._info, self._compute = merged, info, compute
        self.source = merged.source

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._merged.names() if self._merged.moves(name))

    def info(self, name: str) -> TensorInfo:
        return self._info(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)
