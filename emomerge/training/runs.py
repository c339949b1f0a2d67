"""Run directories: one shallow run on disk, its state, metrics and artefact.

runs/sens-0/
  run.json                 state, figures, hashes; `artefact` names the folder below
  metrics.jsonl            one row a step: loss, emoPulse and what it was made of
  adapter/ or model/       the result, PEFT or dense, once the run is done
  adapter-average/ …       the same of the weights averaged inside the run, if the recipe has `runs.average`
  fisher.safetensors       mean squared gradients, if EmoSens trained all weights; method `fisher` finds them here
  snapshots/step-00120/    of a control: adapter or dense weights on the way
  checkpoint.safetensors   where a killed run resumes, or the next round begins; gone once the run is done
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from emomerge.checkpoints import atomic
from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe, Runs
from emomerge.training.state import save_state

Role = Literal["run", "control"]


@dataclass(frozen=True)
class RunSpec:
    """What distinguishes one run from the others under the same recipe, and which piece of it is to be trained."""

    name: str
    optimizer: str
    seed: int
    steps: int
    """The whole budget."""
    control: str | None = None
    """Which of the recipe's `controls` it serves, if it is none of the runs that are merged."""
    rate: float | None = None
    """Peak learning rate of a rival that has no emoPulse."""
    member: int = 0
    """Its number among runs that differ in the order of their batches alone."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the weights are kept."""

    start: int = 0
    """The steps of the rounds before."""
    end: int = 0
    """The steps at the end of the round; by default the whole budget."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.end or self.steps)

    @property
    def role(self) -> Role:
        """What it is for."""
        return "run" if self.control is None else "control"


def planned_runs(recipe: Recipe) -> list[RunSpec]:
    """The shallow runs of a recipe, optimizer by optimizer within each training seed."""
    runs = recipe.runs
    return [RunSpec(f"{optimizer}-{seed}", optimizer, seed, runs.steps) for seed in runs.seeds for optimizer in runs.optimizers]


def round_ends(runs: Runs) -> list[int]:
    """The steps at the end of each round."""
    return [runs.steps * number // runs.rounds for number in range(1, runs.rounds + 1)]


OFF_BY_DEFAULT = ("average", "early_stop", "cooldown", "rounds", "outer")
"""Options that are left out of the hash where they are off, so that runs from before they existed stay good."""


def run_inputs(recipe: Recipe, spec: RunSpec, base_hash: str) -> str:
    """Hash of everything that decides a run's result: a run whose stamp agrees is not trained again."""
    runs, control = recipe.runs, spec.role == "control"
    irrelevant = {"optimizers", "seeds", "steps", "checkpoint_every", "sharding", "log_with", "parallel"}
    shared = runs.model_dump(mode="json", exclude=irrelevant)
    shared["lr"] = runs.lr_of(spec.optimizer)
    idle = {"rounds", "outer", "early_stop"} if control else set()  # a control uses its whole budget, in one go
    idle |= {"average", "cooldown"} if spec.rate is not None else set()
    for name in OFF_BY_DEFAULT:
        if name in idle or getattr(runs, name) == Runs.model_fields[name].default:
            del shared[name]
    others = [runs.optimizers, [runs.lr_of(name) for name in runs.optimizers]] if "rounds" in shared else []
    of_a_control = [spec.rate, recipe.rival.weight_decay, spec.member, spec.snapshots] if control else []
    return digest([base_hash, recipe.adapter, shared, spec.optimizer, spec.seed, spec.steps, *others, *of_a_control])


class RunDir:
    """One run's directory. Every file in it is replaced whole, so that a kill leaves the old or the new, never half."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.squared_gradients = path / "fisher.safetensors"
        self._state_file = path / "run.json"
        self._metrics_file = path / "metrics.jsonl"

    @property
    def state(self) -> dict[str, Any]:
        """What run.json says; empty for a run that never started."""
        try:
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return {}
        return state if isinstance(state, dict) else {}

    def write_state(self, **fields: Any) -> None:
        """Replace run.json by its present content updated with `fields`."""
        atomic.write_json(self._state_file, {**self.state, **fields})

    def is_done(self, inputs: str) -> bool:
        """Whether the finished result of exactly these inputs is here, every file as long as it was written."""
        state = self.state
        if state.get("state") != "done" or state.get("inputs") != inputs:
            return False
        return sizes_agree(self.path, state.get("sizes", {}))

    def has_reached(self, inputs: str, spec: RunSpec) -> bool:
        """Whether the piece of work is done: the whole run, or a round that is not the last one."""
        if spec.end == spec.steps:
            return self.is_done(inputs)
        state = self.state
        at_end = state.get("inputs") == inputs and state.get("step") == spec.end and state.get("state") != "failed"
        return at_end and self.checkpoint.exists()

    @property
    def artefact(self) -> Path:
        """The folder with the trained adapter or dense weights."""
        return self.path / str(self.state["artefact"])

    def snapshot(self, step: int) -> Path:
        """The folder with the weights after a step of a control."""
        return self.path / "snapshots" / f"step-{step:06d}"

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
        try:
            lines = self._metrics_file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def save_checkpoint(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        save_state(self.checkpoint, tensors, header)

    def last_metrics(self) -> dict[str, Any] | None:
        """The last complete row of metrics.jsonl, at the cost of reading its end; None before the first."""
        try:
            with self._metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return None
        row: dict[str, Any] | None = json.loads(lines[-2]) if len(lines) > 1 else None
        return row

    def restart_metrics(self, after_step: int) -> None:
        """Keep the rows up to a step (0 drops all): what a resumed run writes again must not stand twice."""
        kept = [row for row in self.metrics() if row["step"] <= after_step]
        atomic.write_text(self._metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row at the end, for everyone who watches."""
        with atomic.translate_os_error(self._metrics_file), self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative name → bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def sizes_agree(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether every named file is there with the bytes it was written with."""
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False
