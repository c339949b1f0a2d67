"""merge.json: the record of a merge, from which it can be repeated or extended by further runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from emomerge.adapters import input_files
from emomerge.checkpoints import Rounding, sha256
from emomerge.errors import BadInput
from emomerge.files import read_json
from emomerge.merging.registry import check_params, find_method

RECORD = "merge.json"

Hashes = dict[str, str]
"""File → SHA-256."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Run(_Part):
    """One of the runs, with the hashes of its files by name."""

    name: str
    source: str
    sha256: Hashes = {}


class Output(_Part):
    """The options that the merge was written with."""

    dtype: Literal["base", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] = "base"
    rounding: Rounding = "nearest"
    seed: int = 0
    """Seed of stochastic rounding."""
    max_shard_size: str = "5GB"
    save_masks: bool = False
    reestimate: bool = False
    """Whether batch norm statistics were estimated for the merged weights, on the recipe's training data."""
    as_lora: int | Literal["auto"] | None = None
    """Rank of the adapter; None for a model."""
    format: Literal["kohya", "diffusers", "peft"] | None = None
    """Of the adapter; None for the usual one of the base."""
    energy: float = 0.99
    max_rank: int = 256
    allow_partial: bool = False


class MergeRecord(_Part):
    """Everything that determines the bytes of a merge. Sources are recorded as given, with the directory they start from."""

    method: str
    params: dict[str, Any]
    base: str
    base_sha256: Hashes = {}
    runs: tuple[Run, ...]
    recipe: str | None = None
    """The recipe whose validation data gave the held-out loss."""
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe."""
    further_sha256: Hashes = {}
    """Hashes of the other files that were read, by path: the recipe, its data, files that parameters name."""
    output: Output = Output()
    directory: str | None = None
    """The directory that relative sources start from, as seen from the record's own folder; None if that is unknown."""

    def written_to(self, folder: Path) -> MergeRecord:
        """Return the record for a folder, from where its sources are found in any working directory."""
        here, folder = Path.cwd(), folder.absolute()
        apart = here.anchor != folder.anchor  # two drives
        return self.model_copy(update={"directory": str(here) if apart else Path(os.path.relpath(here, folder)).as_posix()})

    def located(self, folder: Path) -> MergeRecord:
        """Return the record in `folder` with sources that the current working directory finds."""
        if self.directory is None:
            return self
        start = folder.absolute() / self.directory

        def place(source: str) -> str:
            there = start / source
            if Path(source).is_absolute() or not there.exists():
                return source
            same = Path(source).exists() and Path(source).samefile(there)
            return source if same else str(there.resolve())

        files = {key: [place(file) for file in self.params[key]] for key in find_method(self.method).run_files
                 if self.params.get(key)}  # fmt: skip
        return self.model_copy(
            update={
                "base": place(self.base),
                "runs": tuple(run.model_copy(update={"source": place(run.source)}) for run in self.runs),
                "recipe": None if self.recipe is None else place(self.recipe),
                "further_sha256": {place(file): digest for file, digest in self.further_sha256.items()},
                "params": self.params | files,
            }
        )

    def with_hashes(self, further: Sequence[Path] = (), digest: Callable[[Path], str] = sha256) -> MergeRecord:
        """Return the record with the hashes of all inputs; reads the files that have none yet.

        Args:
            further: files besides those of the base, the runs and the method's parameters.
            digest: returns the SHA-256 of a file.
        """
        named = find_method(self.method).input_files(self.params, [run.source for run in self.runs])
        read = [*(file for source in named for file in input_files(source).values()), *further]
        known = self.further_sha256
        return self.model_copy(
            update={
                "base_sha256": self.base_sha256 or hashes_of(self.base, digest),
                "runs": tuple(
                    run.model_copy(update={"sha256": run.sha256 or hashes_of(run.source, digest)}) for run in self.runs
                ),
                "further_sha256": known or {str(file): digest(file) for file in read},
            }
        )

    def named(self, names: Sequence[str]) -> MergeRecord:
        """Return the record with the runs' names from the diagnostics."""
        runs = (run.model_copy(update={"name": name}) for run, name in zip(self.runs, names, strict=True))
        return self.model_copy(update={"runs": tuple(runs)})

    def check_base(self) -> None:
        """Raise BadInput, which names the file, if the base has changed."""
        _compare(self.base, self.base_sha256)

    def check_inputs(self) -> None:
        """Raise BadInput, which names the file, if an input has changed."""
        self.check_base()
        for run in self.runs:
            _compare(run.source, run.sha256)
        for file, digest in self.further_sha256.items():
            _require(file, digest, sha256(file) if Path(file).is_file() else None)

    def extended(self, runs: Sequence[str], weights: Sequence[float]) -> MergeRecord:
        """Return the record of a merge of these and further runs with the same method and parameters.

        Args:
            runs: sources of the added runs, as given by the user.
            weights: weights of all runs, if they are weighted.

        Raises:
            BadInput: a parameter holds a value for each recorded run and therefore none for the new ones.
        """
        total = len(self.runs) + len(runs)
        if isinstance(self.params.get("weights"), list) and not weights:
            raise BadInput(
                "the recorded merge gives each of its runs a weight",
                found=", ".join(map(str, self.params["weights"])),
                fix=f"give all {total} runs one: --weight, {total} times",
            )
        for key in find_method(self.method).run_files:
            if self.params.get(key):
                what = f"the recorded merge names files of each of its runs: `{key}`"
                raise BadInput(what, found=len(self.runs), expected=total, fix="merge all runs from scratch")
        params = self.params | ({"weights": list(weights)} if weights else {})
        added = tuple(Run(name=run, source=run) for run in runs)
        return self.model_copy(update={"runs": (*self.runs, *added), "params": params, "further_sha256": {}})


def read_record(path: str | Path) -> MergeRecord:
    """Read the record of a written merge.

    Args:
        path: merge.json or its folder. Relative sources are found in the directory where they were merged.

    Raises:
        BadInput: there is no record, or it lacks the hashes of its inputs.
    """
    file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise BadInput("no record of a merge", where=file)
    record = read_json(file, MergeRecord, what="not the record of a merge")
    check_params(record.method, record.params)
    if not record.base_sha256 or not all(run.sha256 for run in record.runs):
        raise BadInput("the record lacks the hashes of its inputs", where=file, fix="merge from scratch")
    return record.located(file.parent)


def hashes_of(source: str, digest: Callable[[Path], str] = sha256) -> Hashes:
    """Return file name → SHA-256 of the files that a base or a run is read from."""
    return {name: digest(file) for name, file in input_files(source).items()}


def _compare(source: str, hashes: Hashes) -> None:
    found = hashes_of(source)
    for file in sorted(hashes.keys() | found.keys()):
        _require(f"{source}, {file}", hashes.get(file), found.get(file))


def _require(where: str, expected: str | None, found: str | None) -> None:
    if expected != found:
        raise BadInput(
            "an input has changed since it was merged",
            where=where,
            expected=f"SHA-256 {expected}" if expected else "no such file",
            found=found or "no such file",
            fix="restore it, or merge from scratch",
        )


def as_json(record: MergeRecord, **facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of merge.json: the record, with facts about the result."""
    return {**record.model_dump(mode="json"), **{key: value for key, value in facts.items() if value is not None}}
