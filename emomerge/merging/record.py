"""merge.json: what was merged and how, so that it can be merged again, or with further runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from emomerge.adapters import input_files
from emomerge.checkpoints import Rounding, sha256
from emomerge.errors import BadInput
from emomerge.merging.methods.averages import squared_gradients_of

RECORD = "merge.json"

INCREMENTAL = ("mean", "task-arithmetic", "tall-mask")
"""Methods whose parameters mean the same however many runs there are, and that choose nothing among these."""

Hashes = dict[str, str]
"""File → SHA-256."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Run(_Part):
    """One of the runs, with the hashes of its files by their names."""

    name: str
    source: str
    sha256: Hashes = {}


class Output(_Part):
    """What was written."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    rounding: Rounding = "nearest"
    seed: int = 0
    """Of stochastic rounding."""
    max_shard_size: str = "5GB"
    save_masks: bool = False
    as_lora: int | Literal["auto"] | None = None
    """Rank of the adapter; None for a whole model."""
    energy: float = 0.99
    max_rank: int = 256
    allow_partial: bool = False


class MergeRecord(_Part):
    """All that decides the bytes of a merge; sources are as they were typed."""

    method: str
    params: dict[str, Any]
    base: str
    base_sha256: Hashes = {}
    runs: tuple[Run, ...]
    recipe: str | None = None
    """Whose validation data decided what was to be chosen by held-out loss."""
    overrides: tuple[str, ...] = ()
    """Of the recipe."""
    further_sha256: Hashes = {}
    """Of whatever else was read, by path: the recipe, its data, squared gradients."""
    output: Output = Output()

    def with_hashes(self, further: Sequence[Path] = (), digest: Callable[[Path], str] = sha256) -> MergeRecord:
        """The same with the hashes of all inputs; reads those files to their ends that have none yet.

        Args:
            further: files besides the base's and the runs'.
            digest: gives the SHA-256 of a file.
        """
        information = [file for source in self.params.get("information") or () for file in input_files(source).values()]
        if self.method == "fisher" and not information:
            information = [file for run in self.runs if (file := squared_gradients_of(run.source)) is not None]
        known = self.further_sha256
        return self.model_copy(
            update={
                "base_sha256": self.base_sha256 or hashes_of(self.base, digest),
                "runs": tuple(
                    run.model_copy(update={"sha256": run.sha256 or hashes_of(run.source, digest)}) for run in self.runs
                ),
                "further_sha256": known or {str(file): digest(file) for file in [*information, *further]},
            }
        )

    def named(self, names: Sequence[str]) -> MergeRecord:
        """The same with the names that the runs have in the diagnostics."""
        runs = (run.model_copy(update={"name": name}) for run, name in zip(self.runs, names, strict=True))
        return self.model_copy(update={"runs": tuple(runs)})

    def check_base(self) -> None:
        """Raise BadInput, naming the file, where the base is not what it was."""
        _compare(self.base, self.base_sha256)

    def check_inputs(self) -> None:
        """Raise BadInput, naming the file, where an input is not what it was."""
        self.check_base()
        for run in self.runs:
            _compare(run.source, run.sha256)
        for file, digest in self.further_sha256.items():
            _require(file, digest, sha256(file) if Path(file).is_file() else None)

    def extended(self, runs: Sequence[str], weights: Sequence[float]) -> MergeRecord:
        """The merge of these runs and more by the same method and parameters.

        Args:
            runs: what is added, as it was typed.
            weights: of all runs, where each is given one.

        Raises:
            BadInput: a parameter holds a value for each of the old runs and says nothing of the new ones.
        """
        total = len(self.runs) + len(runs)
        if isinstance(self.params.get("weights"), list) and not weights:
            raise BadInput(
                "the recorded merge gives each of its runs a weight",
                found=", ".join(map(str, self.params["weights"])),
                fix=f"give all {total} runs one: --weight, {total} times",
            )
        if self.params.get("information"):
            what, fix = "the recorded merge names the squared gradients of each of its runs", "merge all runs anew"
            raise BadInput(what, found=len(self.runs), expected=total, fix=fix)
        params = self.params | ({"weights": list(weights)} if weights else {})
        added = tuple(Run(name=run, source=run) for run in runs)
        return self.model_copy(update={"runs": (*self.runs, *added), "params": params, "further_sha256": {}})


def read_record(path: str | Path) -> MergeRecord:
    """The record of a written merge: merge.json, or the folder that it is in.

    Raises:
        BadInput: there is none, or it does not say what its inputs were.
    """
    file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
    try:
        record = MergeRecord.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BadInput("no record of a merge", where=file, found=error.strerror) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = f"{file}, {'.'.join(map(str, first['loc']))}"
        raise BadInput("not the record of a merge", where=where, expected=first["msg"]) from None
    if not record.base_sha256 or not all(run.sha256 for run in record.runs):
        raise BadInput(
            "the record holds no hashes of its inputs",
            where=file,
            fix="merge anew",
        )
    return record


def hashes_of(source: str, digest: Callable[[Path], str] = sha256) -> Hashes:
    """File name → SHA-256 of what a base or a run is read from."""
    return {name: digest(file) for name, file in input_files(source).items()}


def _compare(source: str, hashes: Hashes) -> None:
    found = hashes_of(source)
    for file in sorted(hashes.keys() | found.keys()):
        _require(f"{source}, {file}", hashes.get(file), found.get(file))


def _require(where: str, expected: str | None, found: str | None) -> None:
    if expected != found:
        raise BadInput(
            "an input is not what it was when it was merged",
            where=where,
            expected=f"SHA-256 {expected}" if expected else "no such file",
            found=found or "no such file",
            fix="restore it, or merge anew",
        )


def as_json(record: MergeRecord, **facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """merge.json: the record, and what is known of the result."""
    return {**record.model_dump(mode="json"), **{key: value for key, value in facts.items() if value is not None}}
