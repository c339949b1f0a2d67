"""`emomerge run`: base, runs, merges, probe, report, in this order; a stage whose inputs are already stamped is skipped."""

from __future__ import annotations

import base64
import datetime
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from emomerge.adapters import open_run
from emomerge.checkpoints import Checkpoint, RoundingLoss, atomic, model_checkpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput, RunFailed
from emomerge.experiment.assessment import Contestants, assess
from emomerge.experiment.controls import adamw_members, long_adamw_runs, long_run
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.experiment.workspace import Workspace, files_below, local_files, stopwatch
from emomerge.merging import check_params, merge
from emomerge.merging.record import MergeRecord, Output, Run, as_json
from emomerge.numerics.hashing import digest
from emomerge.optim import OPTIMIZERS
from emomerge.progress import Display
from emomerge.recipe import Merge, Recipe
from emomerge.reporting import Card, model_card, png, write_report
from emomerge.results import SCHEMA_VERSION, Cosines, Data, MergeFacts, Results, Rows, Samples, Trace, load_results
from emomerge.tasks import Images, Task, TaskData, Texts, make_task
from emomerge.training import (
    Context,
    Engine,
    Ranks,
    RunDir,
    RunSpec,
    check_trackers,
    choose_device,
    fit,
    follow,
    planned_runs,
    run_inputs,
    train_in_workers,
    train_locally,
    train_runs,
)


class Pipeline:
    """One recipe in one output folder.

    Args:
        recipe: what to do.
        out: where; created if need be.
        display: where progress is shown.
        command: the command line, for the report.
        engine: what starts workers for the runs; None trains them here, one after the other.
        ranks: this process among several that torchrun started; all but the first one only `follow`.

    Raises:
        BadInput: a merge of the recipe has parameters that its method does not know.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        display: Display | None = None,
        command: str = "",
        engine: Engine | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        for spec in recipe.merge:
            check_params(spec.method, spec.params)
        self.recipe, self.command, self.engine, self.ranks = recipe, command, engine, ranks
        self.space = Workspace(out)
        self.display = display or Display(quiet=True)
        self.base_inputs = digest(["base", recipe.base, recipe.task, self.space.input_hash(recipe)])
        self.specs = planned_runs(recipe)

    # The stages.

    def run(self) -> bool:
        """All stages. Returns False where nothing was to be done."""
        with self.space.locked():
            todo = not self.is_complete()
            if todo:
                self.begin()
                with self.display.live():
                    self.make_base()
                    self.train()
                    self.train_controls()
                    self.merge()
                    self.probe()
                    self.report()
        return todo

    def train_all(self, only: Sequence[str] = ()) -> bool:
        """The base and the runs (those of the optimizers in `only`, if given). Returns False where nothing was to be done.

        Raises:
            BadInput: `only` leaves out a run that the others' rounds need.
        """
        if only and self.recipe.runs.rounds > 1 and set(only) < set(self.recipe.runs.optimizers):
            raise BadInput(
                "rounds need all runs", where="runs.rounds", found=f"only {', '.join(only)}",
                fix="leave out --only, or set runs.optimizers",
            )  # fmt: skip
        chosen = [spec for spec in self.specs if not only or spec.optimizer in only]
        with self.space.locked():
            todo = not (self.base_is_done() and all(self.run_is_done(spec) for spec in chosen))
            if todo:
                self.begin()
                with self.display.live():
                    self.make_base()
                    self.train(chosen)
        return todo

    def follow(self) -> None:
        """What all ranks but the first do: take the steps of every run with it."""
        if self.ranks is not None:
            follow(self.ranks, self.task, lambda: self.data)

    def restart(self) -> None:
        """Forget everything that an earlier run of a recipe left in the folder."""
        with self.space.locked():
            self.space.clear()

    def begin(self) -> None:
        """Check what is given before anything is written, then write the recipe down.

        Raises:
            BadInput: the data are unusable, or the folder holds a `base` that is not ours.
        """
        if self.space.base.exists() and not self.space.recipe.exists():
            raise BadInput(
                "this folder has a `base` that emomerge did not make", where=self.space.base, fix="choose another -o"
            )
        given = Path(self.recipe.base.model).expanduser() if self.recipe.base.model else None
        if given is not None and given.exists() and given.resolve().is_relative_to(self.space.out.resolve()):
            raise BadInput("the base lies inside the output folder", where=given, fix="choose another -o")
        check_trackers(self.recipe.runs.log_with)
        _ = self.data
        atomic.write_text(self.space.recipe, self.recipe_yaml)

    def stages(self) -> dict[str, bool]:
        """Every stage in order, and whether it is stamped with its present inputs."""
        return {
            "base": self.base_is_done(),
            "runs": all(self.run_is_done(spec) for spec in self.specs),
            "controls": self.controls_are_done(),
            **{f"merge-{n}": self.space.is_done(f"merge-{n}", inputs) for n, inputs in self.merge_stamps().items()},
            "probe": self.space.is_done("probe", self.probe_inputs),
            "report": self.space.is_done("report", self.report_inputs),
        }

    def is_complete(self) -> bool:
        """Whether nothing is to be done."""
        return all(self.stages().values())

    def make_base(self) -> None:
        """The folder every run starts from: a given model with the head the task needs, or one trained here."""
        if self.base_is_done():
            return
        prepare = self.recipe.base.prepare
        with stopwatch() as clock:
            line = self.display.line("base", prepare.steps if prepare else 1)
            if prepare is not None:
                task = make_task(self.recipe.base_task)
                data = task.load_data(self.recipe.base)
                model = task.new_model(self.recipe.base, data)
                fit(model.to(self.device), task, data, prepare, lambda step, loss: line.at(step, f"loss {loss:.4f}"))
            else:
                task, data = self.task, self.data
                model = task.new_model(self.recipe.base, data)
            self._write_model(model.cpu(), task)
            line.at(prepare.steps if prepare else 1)
        weights = {file.name: atomic.sha256(file) for file in sorted(self.space.base.glob("*.safetensors"))}
        files = files_below(self.space.base)
        self.space.write_stamp("base", self.base_inputs, files, seconds=clock["seconds"], sha256=weights)

    def _write_model(self, model: torch.nn.Module, task: Task) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            task.save_files(model, Path(scratch))
            weights = model_checkpoint(model, source="base")
            write_checkpoint(weights, self.space.base, files_from=Path(scratch), force=True)

    def train(self, specs: Sequence[RunSpec] | None = None) -> None:
        """The shallow runs, and the long run where the recipe wants one."""
        specs = self.specs if specs is None else specs
        lines = {
            spec.name: self.display.line(spec.name, spec.steps, "done" if self.run_is_done(spec) else "waiting")
            for spec in specs
        }
        for spec in specs:
            if self.run_is_done(spec):
                lines[spec.name].at(spec.steps, _closing_note(self.run_dir(spec)))
        if all(self.run_is_done(spec) for spec in specs):
            return

        def on_step(spec: RunSpec, row: dict[str, Any]) -> None:
            lines[spec.name].at(row["step"], f"loss {row['loss']:.4f}  emoPulse {row['rate']:.2e}")

        def execute(pieces: Sequence[RunSpec]) -> None:
            if self.engine is not None:
                train_in_workers(self.engine, self.context, pieces, on_step)
            else:
                train_locally(self.context, pieces, ranks=self.ranks, on_step=on_step, say=self.display.say)

        train_runs(self.context, specs, execute)

    def train_controls(self) -> None:
        """The rivals that a merge must beat, those of them that the recipe wants: runs of equal total compute, and others."""
        if self.controls_are_done():
            return
        recipe, seeds = self.recipe, self.recipe.runs.seeds
        best = [self.best_run(seed) for seed in seeds]
        wanted = [long_run(recipe, spec) for spec in best] if "long-run" in recipe.controls else []
        if "adamw-long-run" in recipe.controls:
            wanted += [spec for seed in seeds for spec in long_adamw_runs(recipe, seed)]
        trained, diverged = self._train_rivals(wanted)
        if "adamw-average" in recipe.controls:
            members = [spec for seed in seeds for spec in adamw_members(recipe, seed, self._adamw_rate(seed, trained))]
            more, diverged_too = self._train_rivals(members)
            trained, diverged = [*trained, *more], [*diverged, *diverged_too]
        plans = [asdict(spec) for spec in trained]
        self.space.write_stamp("controls", self.controls_inputs, [], trained=plans, diverged=diverged)

    def _train_rivals(self, specs: Sequence[RunSpec]) -> tuple[list[RunSpec], list[str]]:
        """Those that came to their end, and what is to be said of the others: a finding about them, no reason to stop."""
        try:
            self.train(specs)
        except RunFailed as error:
            self.display.say(str(error))
            return [spec for spec in specs if self.run_is_done(spec)], [str(error)]
        return list(specs), []

    def _adamw_rate(self, seed: int, trained: Sequence[RunSpec]) -> float:
        """The peak rate whose long run did best on the validation rows; the first listed where none was trained."""
        long = [spec for spec in trained if spec.optimizer == "adamw" and spec.seed == seed]
        best = min(long, key=lambda spec: self.measurer.loss(self.run_artefact(spec), "validation"), default=None)
        return self.recipe.rival.learning_rates[0] if best is None or best.rate is None else best.rate

    def best_run(self, seed: int) -> RunSpec:
        """The single run of a training seed with the lowest validation loss."""
        runs = [spec for spec in self.specs if spec.seed == seed]
        return min(runs, key=lambda spec: self.measurer.loss(self.run_artefact(spec), "validation"))

    @property
    def rival_runs(self) -> list[RunSpec]:
        """The controls that were trained."""
        plans = self.space.stamp("controls").get("trained", [])
        return [RunSpec(**{**plan, "snapshots": tuple(plan["snapshots"])}) for plan in plans]

    def possible_rivals(self) -> list[RunSpec]:
        """Every control that may be trained; which ones depends on which run is the best, and on which rate."""
        recipe = self.recipe
        long = [long_run(recipe, spec) for spec in self.specs]
        long += [spec for seed in recipe.runs.seeds for spec in long_adamw_runs(recipe, seed)]
        rates = recipe.rival.learning_rates
        return long + [s for seed in recipe.runs.seeds for rate in rates for s in adamw_members(recipe, seed, rate)]

    def rivals(self) -> dict[str, list[Artefact]]:
        """Kind of control → its artefact for each training seed that has one; `snapshots` are the long run's on its way."""
        kinds = ("long-run", "adamw-long-run", "adamw-average", "swa", "snapshots")
        found: dict[str, list[Artefact]] = {kind: [] for kind in kinds}
        for seed in self.recipe.runs.seeds:
            of_kind: dict[str | None, list[RunSpec]] = {kind: [] for kind in kinds}
            for spec in self.rival_runs:
                if spec.seed == seed:
                    of_kind[spec.control].append(spec)
            long = [self.run_artefact(spec) for spec in of_kind["adamw-long-run"]]
            if long:
                found["adamw-long-run"].append(min(long, key=lambda a: self.measurer.loss(a, "validation")))
            members = [self.run_artefact(spec) for spec in of_kind["adamw-average"]]
            if members:
                found["adamw-average"].append(self.measurer.average(f"adamw-average-{seed}", members, "adamw-average"))
            for spec in of_kind["long-run"]:
                found["long-run"].append(self.run_artefact(spec))
                snapshots = [self.snapshot_artefact(spec, step) for step in spec.snapshots]
                found["snapshots"] += snapshots
                if "swa" in self.recipe.controls:
                    later = [a for a, step in zip(snapshots, spec.snapshots, strict=True) if 2 * step > spec.steps]
                    found["swa"].append(self.measurer.average(f"swa-{spec.name}", later, "swa"))
        return found

    def merge(self) -> None:
        """Every merge of the recipe, for each training seed."""
        stamps = self.merge_stamps()
        for spec in self.recipe.merge:
            for seed in self.recipe.runs.seeds:
                name = self.merge_name(spec, seed)
                line = self.display.line(f"merge {name}", 1)
                if not self.space.is_done(f"merge-{name}", stamps[name]):
                    with stopwatch() as clock:
                        self._merge_one(spec, seed, name, stamps[name])
                    files = [file for file in files_below(self.space.merges / name) if file.name != "README.md"]
                    self.space.write_stamp(f"merge-{name}", stamps[name], files, seconds=clock["seconds"])
                    self.space.forget("report")  # which completes the model card
                line.at(1, self._merge_note(name))

    def _merge_one(self, spec: Merge, seed: int, name: str, inputs: str) -> None:
        artefacts = [self.run_artefact(run) for run in self.specs if run.seed == seed]
        merged = merge(
            self.base, [a.checkpoint for a in artefacts], method=spec.method, names=[a.name for a in artefacts],
            held_out_loss=self.measurer.held_out_loss, run_losses=[self.measurer.loss(a, "validation") for a in artefacts],
            **spec.params,
        )  # fmt: skip

        loss = RoundingLoss(self.base)

        def papers() -> dict[str, str]:
            decided_by = local_files([str(self.space.recipe), *self.recipe.external_sources()])
            asked = self._merge_record(spec, artefacts).with_hashes(decided_by)
            record = as_json(asked, rounding_loss=loss.figures(), diagnostics=merged.diagnostics())
            record |= {"name": name, "dtype": spec.dtype, "inputs": inputs, "emomerge": version("emomerge")}
            return {"merge.json": json.dumps(record, indent=2) + "\n", "README.md": self._card(name, record, None)}

        write_checkpoint(
            merged,
            self.space.merges / name,
            dtype=spec.dtype,
            loss=loss,
            files_from=self.space.base,
            extra_files=papers,
            force=True,
        )

    def _merge_record(self, spec: Merge, artefacts: Sequence[Artefact]) -> MergeRecord:
        """What `emomerge merge --again` repeats."""
        runs = tuple(Run(name=a.name, source=str(a.path)) for a in artefacts)
        return MergeRecord(
            method=spec.method, params=spec.params, base=str(self.space.base), runs=runs, recipe=str(self.space.recipe),
            output=Output(dtype=spec.dtype),
        )  # fmt: skip

    def _merge_note(self, name: str) -> str:
        diagnostics = self.merge_record(name)["diagnostics"]
        shown = [
            ("scale", diagnostics["params"].get("scale")), ("kept", diagnostics.get("kept_density")),
            ("cos(τ, mean)", diagnostics.get("cosine_to_mean")),
        ]  # fmt: skip
        return "   ".join(f"{key} {value:.3g}" for key, value in shown if isinstance(value, (int, float)))

    def probe(self) -> None:
        """Every figure of every artefact, the controls, and the verdict: results.json."""
        if self.space.is_done("probe", self.probe_inputs):
            return
        with stopwatch() as clock:
            results = self._measure()
        results = results.model_copy(update={"seconds": self._seconds() | {"probe": clock["seconds"]}})
        atomic.write_text(self.space.results, results.to_json())
        self.space.write_stamp("probe", self.probe_inputs, [self.space.results])

    def report(self) -> None:
        """report.html, its figures as PNG, and the model card of every merge, now with its figures."""
        if self.space.is_done("report", self.report_inputs):
            return
        results = self.results()
        line = self.display.line("report", 1)
        write_report(results, self.space.report, png_dir=self.space.figures)
        self._write_cards(results)
        self.space.write_stamp("report", self.report_inputs, [self.space.report, *files_below(self.space.figures)])
        line.at(1, str(self.space.report))

    def _write_cards(self, results: Results) -> None:
        """The card of every written model, now with figures."""
        for name in self.merge_stamps():
            atomic.write_text(self.space.merges / name / "README.md", self._card(name, self.merge_record(name), results))
        shared = {"results": results, "recipe_yaml": self.recipe_yaml, "command": self.command, "version": version("emomerge")}
        prepare = self.recipe.base.prepare
        base = self.recipe.base.model or (f"a small {prepare.model}" if prepare else "the model of the task's function")
        about = f"The base of all runs of the recipe `{self.recipe.name}`: {base}."
        self._write_card(self.space.base, {"name": "base", "about": about, **shared})
        for spec in [*self.specs, *self.rival_runs]:
            optimizer = (
                OPTIMIZERS[spec.optimizer].class_name if spec.rate is None else f"AdamW, peak rate {spec.rate:g}, cosine"
            )
            about = f"Trained from `{self.space.base}` for {spec.steps} steps with {optimizer}"
            rounds = self.recipe.runs.rounds if spec.role == "run" else 1
            about += "." if rounds == 1 else f", in {rounds} rounds that each began at the mean of all runs."
            self._write_card(
                self.run_dir(spec).artefact, {"name": spec.name, "about": about, "base": str(self.space.base), **shared}
            )

    def _write_card(self, folder: Path, context: dict[str, Any]) -> None:
        title = f"{self.recipe.name}, {context['name']}"
        atomic.write_text(folder / "README.md", model_card(Card(title=title, **context)))

    # What the stages share.

    @cached_property
    def device(self) -> torch.device:
        """Where models live."""
        return choose_device(self.recipe.device)

    @cached_property
    def task(self) -> Task:
        """What is learnt."""
        return make_task(self.recipe.task)

    @cached_property
    def data(self) -> TaskData:
        """The splits."""
        return self.task.load_data(self.recipe.base)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's weights."""
        return open_checkpoint(self.space.base)

    @property
    def context(self) -> Context:
        """What all runs share, once the base is made."""
        context = Context(self.recipe, self.space.base, self.base_hash, self.space.runs)
        return context.using(self.task, self.data)

    @cached_property
    def measurer(self) -> Measurer:
        """Measures artefacts on one live model."""
        return Measurer(
            self.recipe,
            self.task,
            self.data,
            self.base,
            self.space.base,
            self.base_hash,
            self.device,
            self.space.ledger,
        )

    @cached_property
    def recipe_yaml(self) -> str:
        """The recipe with every default filled in."""
        return yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def base_is_done(self) -> bool:
        """Whether the base folder is up to date."""
        return self.space.is_done("base", self.base_inputs)

    @property
    def base_hash(self) -> str:
        """Hash of the base's weights, once it is made: another base makes everything after it stale."""
        return digest([self.base_inputs, self.space.stamp("base").get("sha256")])

    def run_dir(self, spec: RunSpec) -> RunDir:
        """The directory of a run."""
        return RunDir(self.space.runs / spec.name)

    def run_is_done(self, spec: RunSpec) -> bool:
        """Whether a run's result is up to date."""
        return self.run_dir(spec).is_done(run_inputs(self.recipe, spec, self.base_hash))

    @property
    def controls_inputs(self) -> str:
        """Hash of what the controls are trained from."""
        wanted = sorted({"long-run", "adamw-long-run", "adamw-average"} & set(self.recipe.controls))
        return digest([self.run_hashes(), wanted, self.recipe.rival, self.recipe.probe.batch_size])

    def run_hashes(self, seed: int | None = None) -> list[Any]:
        """Inputs and weights of the runs, of one training seed or of all."""
        wanted = [spec for spec in self.specs if seed in (None, spec.seed)]
        return [[run_inputs(self.recipe, run, self.base_hash), self.run_dir(run).state.get("sha256")] for run in wanted]

    def controls_are_done(self) -> bool:
        """Whether every control that has to be trained is."""
        done = self.space.is_done("controls", self.controls_inputs)
        return done and all(self.run_is_done(spec) for spec in self.rival_runs)

    def run_artefact(self, spec: RunSpec) -> Artefact:
        """A trained run, as base + adapter or dense weights."""
        run = self.run_dir(spec)
        state = run.state
        return Artefact(
            spec.name, spec.role, open_run(self.base, run.path),
            digest([self.base_hash, state["sha256"]]), path=run.artefact, optimizer=spec.optimizer, seed=spec.seed,
            control=spec.control,
            seconds=state["seconds"], sha256=state["sha256"],
        )  # fmt: skip

    def snapshot_artefact(self, spec: RunSpec, step: int) -> Artefact:
        """A control on its way."""
        folder = self.run_dir(spec).snapshot(step)
        weights = {file.name: atomic.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        return Artefact(
            f"{spec.name} at step {step}", "control", open_run(self.base, folder),
            digest([self.base_hash, weights]), optimizer=spec.optimizer, seed=spec.seed,
        )  # fmt: skip

    def merge_name(self, spec: Merge, seed: int) -> str:
        """The folder of a merge; every training seed is merged on its own, as one repetition of the experiment."""
        return spec.label if len(self.recipe.runs.seeds) == 1 else f"{spec.label}-seed{seed}"

    def merge_stamps(self) -> dict[str, str]:
        """Name → hash of inputs of every merge."""
        shared = [self.recipe.task, self.recipe.probe.batch_size, version("emomerge")]
        return {
            self.merge_name(spec, seed): digest([spec, self.run_hashes(seed), shared])
            for spec in self.recipe.merge
            for seed in self.recipe.runs.seeds
        }

    def merge_record(self, name: str) -> dict[str, Any]:
        """merge.json of a written merge."""
        record: dict[str, Any] = json.loads((self.space.merges / name / "merge.json").read_text(encoding="utf-8"))
        return record

    def merge_artefact(self, spec: Merge, seed: int) -> Artefact:
        """A written merge."""
        name = self.merge_name(spec, seed)
        folder = self.space.merges / name
        weights = {file.name: atomic.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        return Artefact(
            name, "merge", open_checkpoint(folder), digest(weights), path=folder, seed=seed, method=spec.method, sha256=weights,
            seconds=self.space.stamp(f"merge-{name}").get("seconds"),
            cosine_to_mean=self.merge_record(name)["diagnostics"].get("cosine_to_mean"),
        )  # fmt: skip

    @property
    def probe_inputs(self) -> str:
        """Hash of what the probe measures."""
        recipe = self.recipe
        rivals = [self.run_dir(spec).state.get("sha256") for spec in self.rival_runs]
        shared = [recipe.name, self.merge_stamps(), rivals, recipe.probe, recipe.controls, recipe.select]
        return digest([*shared, SCHEMA_VERSION])

    @property
    def report_inputs(self) -> str:
        """Hash of what the report shows."""
        return digest([self.probe_inputs, version("emomerge")])

    def results(self) -> Results:
        """results.json."""
        return load_results(self.space.out)

    # Measuring.

    def _measure(self) -> Results:
        seeds = self.recipe.runs.seeds
        merges = {spec.label: [self.merge_artefact(spec, seed) for seed in seeds] for spec in self.recipe.merge}
        base = Artefact("base", "base", self.base, self.base_hash, path=self.space.base)
        best = [self.run_artefact(self.best_run(seed)) for seed in seeds]
        controls = self.rivals()
        snapshots = controls.pop("snapshots")
        runs = [self.run_artefact(spec) for spec in self.specs]
        contestants = Contestants(base, runs, merges, best, controls, snapshots)
        assessed = assess(self.recipe, self.measurer, contestants, display=self.display, engine=self.engine)
        return assessed.model_copy(
            update={
                **self._heading(),
                "samples": self._samples([base, best[0], merges[self.recipe.merge[0].label][0]]),
                "traces": self._traces(),
                "cosines": self._cosines(merges),
                "merges": {n: MergeFacts.model_validate(self.merge_record(n)["diagnostics"]) for n in self.merge_stamps()},
            }
        )

    def _heading(self) -> dict[str, Any]:
        packages = ("emomerge", "torch", "transformers", "peft", "numpy")
        data = self.data
        return {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_yaml": self.recipe_yaml,
            "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
            "device": str(self.device),
            "data": Data(
                summary=data.summary,
                rows=Rows(train=len(data.train), validation=len(data.validation), test=len(data.test)),
                classes=tuple(data.classes),
                unit=self.task.unit,
            ),
        }

    def _samples(self, artefacts: Sequence[Artefact]) -> Samples | None:
        """What some artefacts generate, for tasks whose models generate something."""
        made = {}
        for artefact in artefacts:
            self.measurer.load(artefact)
            made[artefact.name] = self.task.samples(self.measurer.model)
        texts = {name: samples for name, samples in made.items() if isinstance(samples, Texts)}
        if texts:
            first = texts["base"]
            of_artefact = {name: tuple(samples.texts) for name, samples in texts.items()}
            return Samples(about=first.about, prompts=tuple(first.prompts), texts=of_artefact)
        images = {name: samples for name, samples in made.items() if isinstance(samples, Images)}
        if not images:
            return None
        shown = {name: base64.b64encode(png(samples.picture.numpy())).decode() for name, samples in images.items()}
        return Samples(about=images["base"].about, images=shown)

    def _traces(self) -> dict[str, Trace]:
        columns = ("step", "loss", "rate", "sigma", "trust")
        traces = {}
        for spec in self.specs:
            rows = list(self.run_dir(spec).metrics())
            steps = {column: tuple(row[column] for row in rows) for column in columns}
            traces[spec.name] = Trace(optimizer=spec.optimizer, seed=spec.seed, **steps)
        return traces

    def _cosines(self, merges: dict[str, list[Artefact]]) -> Cosines:
        """Pairwise cosines of the task vectors; every merge of one seed measured the same ones."""
        diagnostics = self.merge_record(next(iter(merges.values()))[0].name)["diagnostics"]
        return Cosines(names=diagnostics["runs"], matrix=diagnostics["cosines"], sign_agreement=diagnostics["sign_agreement"])

    def _seconds(self) -> dict[str, float]:
        return {
            "base": self.space.stamp("base").get("seconds", 0.0),
            "runs": sum(self.run_dir(spec).state["seconds"] for spec in self.specs),
            "merge": sum(self.space.stamp(f"merge-{name}").get("seconds", 0.0) for name in self.merge_stamps()),
        }

    def _card(self, name: str, record: dict[str, Any], results: Results | None) -> str:
        params = record["diagnostics"].get("params", record["params"])
        known = {
            "title": f"{self.recipe.name}, {name}", "name": name, "base": self.recipe.base.model or "prepared",
            "params": params, "results": results, "recipe_yaml": self.recipe_yaml, "command": self.command,
            "version": record["emomerge"],
        }  # fmt: skip
        return model_card(Card.model_validate(record | known))


def _closing_note(run: RunDir) -> str:
    return f"loss {run.state['last_loss']:.4f}"
