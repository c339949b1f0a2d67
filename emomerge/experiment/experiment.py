"""One recipe in one output folder: the state that all stages share, and the artefacts that they produce."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from emomerge.adapters import open_run
from emomerge.checkpoints import Checkpoint, atomic, open_checkpoint
from emomerge.experiment.costs import Cost, total
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.experiment.points import end_of, snapshot_of
from emomerge.experiment.workspace import Workspace
from emomerge.files import JsonObject, read_json
from emomerge.numerics.hashing import digest
from emomerge.progress import Display
from emomerge.recipe import Merge, Recipe
from emomerge.results import TRUNK
from emomerge.tasks import Task, TaskData, make_task
from emomerge.training import Context, KeptRounds, RunDir, RunSpec, choose_device, planned_runs, planned_trunks, run_inputs


class _Record(BaseModel):
    """What is read of the merge.json of a merge."""

    model_config = ConfigDict(extra="allow")

    method: str
    params: JsonObject
    diagnostics: JsonObject


class Experiment:
    """State that the stages share: task, data, base, measurer, hashes of inputs, and artefacts.

    Args:
        recipe: the recipe.
        out: the output folder.
        display: shows progress; by default nothing is shown.
        command: the command line, for the report.
    """

    def __init__(self, recipe: Recipe, out: Path, *, display: Display | None = None, command: str = "") -> None:
        self.recipe, self.command = recipe, command
        self.space = Workspace(out)
        self.display = display or Display(quiet=True)
        self.paths = recipe.written | self.space.paths()
        self.as_written = recipe.as_written(self.paths)
        self.base_inputs = digest(["base", self.as_written.base, self.as_written.task, self.space.input_hash(recipe)])
        self.specs = planned_runs(recipe)
        self.trunks = planned_trunks(recipe)
        self._opened: dict[tuple[Path, str], Artefact] = {}
        """Finished runs by their folder and the hash of what is known of them."""

    @cached_property
    def device(self) -> torch.device:
        """The device on which models are trained and measured."""
        return choose_device(self.recipe.device)

    @cached_property
    def task(self) -> Task:
        """The recipe's task."""
        return make_task(self.recipe.task)

    @cached_property
    def data(self) -> TaskData:
        """The splits of the task's data."""
        return self.task.load_data(self.recipe.base)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's weights."""
        return open_checkpoint(self.space.base)

    @property
    def context(self) -> Context:
        """The context for training and measuring; requires the base."""
        context = Context(self.recipe, self.space.base, self.base_hash, self.space.runs)
        return context.using(self.task, self.data, self.base)  # the same object with which runs are opened, as merges check

    @cached_property
    def measurer(self) -> Measurer:
        """The measurer of artefacts."""
        return Measurer(self.context, self.space.ledger)

    @cached_property
    def recipe_yaml(self) -> str:
        """The recipe as YAML, including defaults, with paths as they were given."""
        return as_yaml(self.as_written)

    @property
    def base_hash(self) -> str:
        """The hash of the base and its inputs; anything trained from a different base is stale."""
        return digest([self.base_inputs, self.space.stamp("base").get("sha256")])

    def run_dir(self, spec: RunSpec) -> RunDir:
        """Return the directory of a run."""
        return RunDir(self.space.runs / spec.name)

    def run_is_done(self, spec: RunSpec) -> bool:
        """Return whether a run's result is up to date."""
        return self.run_dir(spec).is_done(run_inputs(self.recipe, spec, self.base_hash))

    def say_if_stopped(self, spec: RunSpec) -> None:
        """Tell the user if a finished run did not take all its steps."""
        taken = self.run_dir(spec).state["steps_taken"]
        if taken < spec.steps:
            self.display.say(f"{spec.name}: stopped at step {taken} of {spec.steps}, where it overfits")

    def run_hashes(self, seed: int | None = None) -> list[Any]:
        """Return inputs and weight hashes of the runs of one training seed, or of all."""
        wanted = [spec for spec in self.specs if seed in (None, spec.seed)]
        return [[run_inputs(self.recipe, run, self.base_hash), self.run_dir(run).state.get("sha256")] for run in wanted]

    def best_run(self, seed: int) -> RunSpec:
        """Return the run of a training seed with the lowest validation loss."""
        runs = {spec.name: spec for spec in self.specs if spec.seed == seed}
        return runs[self.measurer.best([self.run_artefact(spec) for spec in runs.values()]).name]

    def cost_of(self, specs: Iterable[RunSpec]) -> Cost:
        """Return what it cost to train some runs."""
        runs, costs = self.recipe.runs, []
        for spec in specs:
            state = self.run_dir(spec).state
            costs.append(Cost(state["steps_taken"] * runs.batch_size * spec.micro_batches(runs), state.get("cpu_seconds")))
        return total(costs)

    def cost_of_runs(self, seed: int) -> Cost:
        """Return what it cost to train all runs of a training seed, their trunk included."""
        return self.cost_of(spec for spec in [*self.trunks, *self.specs] if spec.seed == seed)

    @property
    def base_artefact(self) -> Artefact:
        """The base as an artefact."""
        return Artefact("base", "base", self.base, self.base_hash, path=self.space.base)

    def run_artefact(self, spec: RunSpec) -> Artefact:
        """Return a trained run as an artefact."""
        run, shares_steps = self.run_dir(spec), self.recipe.runs.rounds > 1 or bool(self.trunks)
        key = run.path, digest([self.base_hash, run.state])
        if key not in self._opened:  # reading an adapter takes longer than a small model's pass
            self._opened[key] = end_of(self.context, spec)
        cost = self.cost_of_runs(spec.seed) if spec.role == "run" and shares_steps else self.cost_of([spec])
        return replace(self._opened[key], cost=cost)

    def snapshot_artefact(self, spec: RunSpec, step: int) -> Artefact:
        """Return a snapshot of a control or a trunk as an artefact; its cost is known once the run is done."""
        snapshot = snapshot_of(self.context, spec, step)
        return replace(snapshot, cost=self.cost_of([spec])) if self.run_is_done(spec) else snapshot

    def kept_rounds(self, seed: int) -> KeptRounds:
        """Return the kept rounds of a training seed."""
        inputs = [run_inputs(self.recipe, spec, self.base_hash) for spec in self.specs if spec.seed == seed]
        return KeptRounds(self.space.runs, seed, inputs)

    def round_artefacts(self, seed: int) -> list[Artefact]:
        """Return the kept rounds of a training seed as artefacts, in order."""
        kept = self.kept_rounds(seed)
        return [
            Artefact(
                f"round-{number}" if number else TRUNK, "control", open_run(self.base, kept.path(number)),
                digest([self.base_hash, kept.sha256(number)]), path=kept.path(number), seed=seed,
            )
            for number in self.recipe.runs.kept_rounds
        ]  # fmt: skip

    def merged_artefacts(self, spec: Merge, seed: int) -> list[Artefact]:
        """Return the artefacts that a merge of a training seed is made of."""
        if spec.of == "rounds":
            return self.round_artefacts(seed)
        return [self.run_artefact(run) for run in self.specs if run.seed == seed]

    def merged_hashes(self, spec: Merge, seed: int) -> list[Any]:
        """Return the hashes of everything that a merge of a training seed is made of."""
        if spec.of == "rounds":
            kept = self.kept_rounds(seed)
            return [self.base_hash, *(kept.sha256(number) for number in self.recipe.runs.kept_rounds)]
        return self.run_hashes(seed)

    def merge_name(self, spec: Merge, seed: int) -> str:
        """Return the name of a merge's folder. Each training seed is merged separately, as a repetition of the experiment."""
        return spec.label if len(self.recipe.runs.seeds) == 1 else f"{spec.label}-seed{seed}"

    @property
    def merge_names(self) -> list[str]:
        """The names of all merges' folders."""
        return [self.merge_name(spec, seed) for spec in self.recipe.merge for seed in self.recipe.runs.seeds]

    def merge_stamps(self) -> dict[str, str]:
        """Return the hash of the inputs of every merge, by name."""
        seeds = self.recipe.runs.seeds
        return {self.merge_name(spec, seed): self.merge_stamp(spec, seed) for spec in self.recipe.merge for seed in seeds}

    def merge_stamp(self, spec: Merge, seed: int) -> str:
        """Return the hash of the inputs of a merge."""
        shared = [self.as_written.task, self.recipe.probe.batch_size, version("emomerge")]
        return digest([spec, self.merged_hashes(spec, seed), shared])

    def merge_record(self, name: str) -> dict[str, Any]:
        """Return merge.json of a written merge."""
        return read_json(self.space.merges / name / "merge.json", _Record, fix="merge again with --restart").model_dump()

    def merge_artefact(self, spec: Merge, seed: int) -> Artefact:
        """Return a written merge as an artefact."""
        name = self.merge_name(spec, seed)
        folder, stamp = self.space.merges / name, self.space.stamp(f"merge-{name}")
        weights = {file.name: atomic.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        return Artefact(
            name, "merge", open_checkpoint(folder), digest(weights), path=folder, seed=seed, method=spec.method, sha256=weights,
            seconds=stamp.get("seconds"), cost=total([self.cost_of_runs(seed), Cost(0, stamp.get("cpu_seconds"))]),
            cosine_to_mean=self.merge_record(name)["diagnostics"].get("cosine_to_mean") if spec.of == "runs" else None,
        )  # fmt: skip

    @property
    def trained_controls(self) -> list[RunSpec]:
        """The controls that have been trained."""
        plans = self.space.stamp("controls").get("trained", [])
        return [RunSpec(**{**plan, "snapshots": tuple(plan["snapshots"])}) for plan in plans]


def as_yaml(recipe: Recipe) -> str:
    """Return a recipe as YAML, including defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
