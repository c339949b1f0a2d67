"""Run directories: the state, metrics and trained weights of one run on disk.

runs/sens-0/
  run.json                 state, figures, hashes; `artefact` names the folder with the result
  metrics.jsonl            one row per step: loss, emoPulse and its components
  adapter/ or model/       the result (PEFT adapter or dense weights) once the run is done
  adapter-average/ …       the same for the weights averaged within the run, if the recipe sets `runs.average`
  fisher.safetensors       mean squared gradients of a full fine-tune, read by the merge method `fisher`
  snapshots/step-00120/    of a control or a trunk: adapter or dense weights after a step
  checkpoint.safetensors   where a killed run resumes or the next round starts; removed once the run is done
runs/start-0.safetensors   the weights of the trunk at which the runs of a training seed branch off: see `training.trunk`
runs/rounds-0/             the means of all runs of a training seed at the end of some rounds: see `training.kept`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from emomerge.checkpoints import atomic
from emomerge.errors import BadInput
from emomerge.files import parse_json, read_bytes, read_json_or
from emomerge.training.plan import RunSpec
from emomerge.training.state import load_state, of_kind, save_state

LARGEST_METRICS = 2**32


class _State(BaseModel):
    """The fields of run.json that this package reads, of the types that it writes; others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    state: str = ""
    inputs: str | None = None
    step: int = 0
    artefact: str = ""
    sizes: dict[str, int] = {}
    seconds: float = 0.0
    last_loss: float | None = None
    error: str | None = None


class _Row(BaseModel):
    """A row of metrics.jsonl."""

    model_config = ConfigDict(extra="allow")

    step: int
    loss: float | None = None
    rate: float | None = None


class RunDir:
    """The directory of one run. Every file is replaced atomically, so a kill leaves either the old or the new version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.squared_gradients = path / "fisher.safetensors"
        self._state_file = path / "run.json"
        self._metrics_file = path / "metrics.jsonl"

    @property
    def state(self) -> dict[str, Any]:
        """The contents of run.json; empty for a run that never started."""
        return read_json_or(self._state_file, _State, _State()).model_dump(exclude_unset=True)

    def write_state(self, **fields: Any) -> None:
        """Update run.json with `fields`."""
        atomic.write_json(self._state_file, {**self.state, **fields})

    def is_done(self, inputs: str) -> bool:
        """Return whether a finished result of exactly these inputs is here, with every file at its recorded size."""
        state = self.state
        if state.get("state") != "done" or state.get("inputs") != inputs:
            return False
        return sizes_agree(self.path, state.get("sizes", {}))

    def has_reached(self, inputs: str, spec: RunSpec) -> bool:
        """Return whether the run is trained to `spec.end`: the end of the run, or of a round before the last one."""
        if spec.is_last_round:
            return self.is_done(inputs)
        state = self.state
        at_end = state.get("inputs") == inputs and state.get("step") == spec.end and state.get("state") != "failed"
        is_kept = spec.end not in spec.snapshots or self.snapshot(spec.end).is_dir()  # it is written after the checkpoint
        return at_end and is_kept and self.checkpoint.exists()

    @property
    def artefact(self) -> Path:
        """The folder with the trained adapter or dense weights."""
        return self.path / str(self.state["artefact"])

    def snapshot(self, step: int) -> Path:
        """Return the folder with the weights of a control or a trunk after a step."""
        return self.path / "snapshots" / f"step-{step:06d}"

    def remove_snapshots(self, steps: Iterable[int]) -> None:
        """Remove snapshots of a finished run, which stays finished."""
        folders = [self.snapshot(step) for step in steps]
        removed = tuple(f"{folder.relative_to(self.path)}/" for folder in folders)
        kept = {name: size for name, size in self.state.get("sizes", {}).items() if not name.startswith(removed)}
        self.write_state(sizes=kept)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl, without a last line that a kill cut short."""
        if not self._metrics_file.is_file():
            return
        for line in read_bytes(self._metrics_file, largest=LARGEST_METRICS).splitlines():
            try:
                yield parse_json(line, _Row, where=self._metrics_file).model_dump(exclude_unset=True)
            except BadInput:
                return

    def save_checkpoint(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        save_state(self.checkpoint, tensors, header)

    def last_metrics(self) -> dict[str, Any] | None:
        """Return the last complete row of metrics.jsonl, reading only the end of the file; None if there is none."""
        try:
            with self._metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return None
        if len(lines) < 2:
            return None
        return parse_json(lines[-2], _Row, where=self._metrics_file).model_dump(exclude_unset=True)

    def restart_metrics(self, after_step: int) -> None:
        """Drop the rows after a step (0 drops all), since a resumed run writes them again."""
        kept = [row for row in self.metrics() if row["step"] <= after_step]
        atomic.write_text(self._metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        with atomic.translate_os_error(self._metrics_file), self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def sizes_agree(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Return whether every named file exists and has the given size in bytes."""
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def round_start_file(run: RunDir, spec: RunSpec) -> Path:
    """Return the file with the weights that the runs of a training seed start their next round from."""
    return run.path.parent / f"meeting-{spec.seed}.safetensors"


def start_file(run: RunDir, spec: RunSpec) -> Path:
    """Return the file with the weights of the trunk at which the runs of a training seed branch off."""
    return run.path.parent / f"start-{spec.seed}.safetensors"


def load_start(run: RunDir, spec: RunSpec) -> dict[str, Tensor]:
    """Return the weights that a run branches off from, by name. Raises BadInput if they are missing."""
    file = start_file(run, spec)
    found = load_state(file, kinds=("model",))
    if found is None:
        raise BadInput("the weights that the runs branch off from are missing", where=file, fix="run the same command again")
    return of_kind(found[1], "model")


def load_round_start(run: RunDir, spec: RunSpec) -> dict[str, Tensor]:
    """Return the weights that a run's round starts from, by name. Raises BadInput if they are missing."""
    file = round_start_file(run, spec)
    found = load_state(file, kinds=("model",))
    if found is None or found[0]["step"] != spec.start:
        raise BadInput("the weights that the round starts from are missing", where=file, fix="run the same command again")
    return of_kind(found[1], "model")
