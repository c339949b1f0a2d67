"""TALL-masks as compressed runs: one reference for all, one bit a weight for each (Wang et al. 2024).

    θ̂_t = θ₀ + mask_t ⊙ R

A merge holds scale·keep ⊙ R only, so R is kept beside it. Of N runs that takes 4 + N/8 bytes a moved weight; N dense copies
in 16 bits take 2N of every weight. Both files go into a folder of their own: some loaders read every .safetensors of a model's.
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
from emomerge.merging.engine import MergedCheckpoint
from emomerge.merging.methods.tall_mask import localize, reference_vector
from emomerge.merging.vectors import CHUNK, Candidate

MASKS = "masks/masks.safetensors"
"""Of each tensor that a run moved: uint8 (runs, ⌈n/8⌉), whose bit i of byte j is that of the flat tensor's element 8j + i."""
REFERENCE = "masks/reference.safetensors"
"""R of the same tensors, in float32 (float64 where the base is)."""

Compute = Callable[[str], Tensor]


def mask_files(merged: MergedCheckpoint, reference: str) -> dict[str, SideFile]:
    """What `write_checkpoint` puts beside a merge by tall-mask, so that `reconstruct` can give back each run.

    The metadata are `runs`, a JSON list of their names; `reference`, as given; and `bits`, the order of the bits in a byte.
    A tensor of the files is computed when it is written.
    """
    metadata = {"runs": json.dumps(merged.runs), "reference": reference, "bits": "little"}

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
    """R (n,) and the masks (runs, n) of the pieces of a tensor that moved, each of them but the last a multiple of 8 long."""
    given = merged.given(name)
    for deltas in given["deltas"].split(CHUNK, dim=1):
        r = reference_vector(deltas, given["weights"], given["reference"], given["survey"])
        yield r, localize(deltas, r, deltas.new_tensor(given["lambdas"]).unsqueeze(1))


def reconstruct(folder: Path, run: str, base: Checkpoint) -> Candidate:
    """θ₀ + mask_t ⊙ R, lazily.

    Args:
        folder: a merge with its masks.
        run: the run's name, or the last part of its path where that is one run's only.
        base: θ₀.

    Raises:
        BadInput: the folder holds no masks, or none of that run.
    """
    for file in (MASKS, REFERENCE):
        if not (folder / file).is_file():
            raise BadInput("no masks in this folder", where=folder / file, fix="merge by tall-mask with --save-masks")
    masks, references = open_checkpoint(folder / MASKS), open_checkpoint(folder / REFERENCE)
    place = find_run(run, json.loads(read_header(folder / MASKS).metadata.get("runs", "[]")))

    def tau(name: str) -> Tensor | None:
        if name not in masks:
            return None
        r = references[name]
        return torch.where(unpack(masks[name][place], r.numel()).view(r.shape), r, 0)

    return Candidate(base, tau)


def find_run(run: str, names: Sequence[str]) -> int:
    """The place of a run among the names. Raises BadInput where there is none, or more than one."""
    found = [i for i, name in enumerate(names) if name == run] or [i for i, n in enumerate(names) if Path(n).name == run]
    if len(found) != 1:
        raise BadInput("no such run in this merge", found=run, expected=", ".join(names))
    return found[0]


def pack(masks: Tensor) -> Tensor:
    """Booleans (runs, n) as bytes (runs, ⌈n/8⌉)."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: Tensor, n: int) -> Tensor:
    """Booleans (n,) of bytes (⌈n/8⌉,)."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little")).bool()


class _Computed(Checkpoint):
    """A tensor of another kind for each one that the merge's runs moved."""

    def __init__(self, merged: MergedCheckpoint, info: Callable[[str], TensorInfo], compute: Compute) -> None:
        self._merged, self._info, self._compute = merged, info, compute
        self.source = merged.source

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._merged.names() if self._merged.moves(name))

    def info(self, name: str) -> TensorInfo:
        return self._info(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)
