"""The means at which the runs of a training seed meet, kept as checkpoints. Merges `of: rounds` are made of them.

runs/rounds-0/
  rounds.json   the hash of the runs' inputs; for each kept round, the hashes and sizes of its files
  round-12/     the mean at the end of round 12: a PEFT adapter or a dense checkpoint
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge.checkpoints import atomic, working_dtype
from emomerge.files import read_json_or
from emomerge.numerics.hashing import digest
from emomerge.training.run_dir import file_sizes, sizes_agree


class _Kept(BaseModel):
    """Hashes and sizes of the files of a kept round."""

    sha256: dict[str, str]
    sizes: dict[str, int]


class _Index(BaseModel):
    """The content of rounds.json."""

    inputs: str = ""
    rounds: dict[str, _Kept] = {}


class KeptRounds:
    """The kept rounds of one training seed on disk.

    Args:
        runs_folder: the folder that holds the run directories.
        seed: the training seed.
        inputs: the inputs hash of each run of the seed; rounds that were kept of other inputs do not count.
    """

    def __init__(self, runs_folder: Path, seed: int, inputs: Sequence[str]) -> None:
        self.folder = runs_folder / f"rounds-{seed}"
        self._inputs = digest(list(inputs))
        self._index = self.folder / "rounds.json"

    def path(self, number: int) -> Path:
        """Return the folder of a round's mean."""
        return self.folder / f"round-{number}"

    def sha256(self, number: int) -> dict[str, str] | None:
        """Return the SHA-256 of each weight file of a round's mean; None if it is not kept."""
        hashes: dict[str, str] | None = self._rounds().get(str(number), {}).get("sha256")
        return hashes

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return those of the rounds that are not kept or not complete."""
        rounds = self._rounds()
        known = {number: rounds.get(str(number)) for number in numbers}
        return [n for n, facts in known.items() if facts is None or not sizes_agree(self.path(n), facts["sizes"])]

    def keep(self, number: int, write: Callable[[Path], None]) -> None:
        """Keep the mean of a round, replacing it if it was kept before.

        Args:
            number: the round, counted from 1.
            write: writes the checkpoint to a folder, atomically.
        """
        folder = self.path(number)
        write(folder)
        weights = {str(file.relative_to(folder)): atomic.sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
        rounds = {**self._rounds(), str(number): {"sha256": weights, "sizes": file_sizes(folder)}}
        atomic.write_json(self._index, {"inputs": self._inputs, "rounds": rounds})

    def discard(self) -> None:
        """Remove all kept rounds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rounds(self) -> dict[str, Any]:
        """Return the kept rounds of these inputs, by number."""
        found = read_json_or(self._index, _Index, _Index())
        return {number: kept.model_dump() for number, kept in found.rounds.items()} if found.inputs == self._inputs else {}


def write_mean(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of the weights in several folders with the same files; all other files are those of the first.

    Adapters are averaged factor by factor. Integer tensors are taken from the first folder.
    """
    first = folders[0]
    with atomic.new_folder(out, force=True) as temporary:
        for name in sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file()):
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.suffix == ".safetensors":
                with safe_open(first / name, framework="pt") as opened:
                    metadata = opened.metadata()
                save_file(mean_tensors(load_file(folder / name) for folder in folders), target, metadata=metadata)
            elif str(name) != "README.md":  # the model card of the first run
                shutil.copyfile(first / name, target)


def mean_tensors(of_runs: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the runs' tensors of the same names, in their dtype. Integer tensors are those of the first run.

    Args:
        of_runs: each run's tensors by name, in the order of summation; read one after the other.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    count = 0
    for tensors in of_runs:
        count += 1
        for name, tensor in tensors.items():
            if name not in total:
                dtypes[name] = tensor.dtype
                total[name] = tensor.to(working_dtype(tensor.dtype)) if tensor.is_floating_point() else tensor
            elif tensor.is_floating_point():
                total[name] = total[name] + tensor
    return {name: (t / count).to(dtypes[name]) if t.is_floating_point() else t for name, t in total.items()}
