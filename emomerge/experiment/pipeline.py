"""`emomerge run`: base, runs, controls, merges, probe, report. Stages whose stamp matches their current inputs are skipped."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emomerge.checkpoints import atomic
from emomerge.errors import BadInput, EmomergeError
from emomerge.experiment.base import NewBase, make_base, new_base, work_of
from emomerge.experiment.cards import write_cards
from emomerge.experiment.collect import collect_results, measure_so_far, seconds_of_stages
from emomerge.experiment.control_runs import controls_inputs, train_controls
from emomerge.experiment.crew import Crew
from emomerge.experiment.experiment import Experiment, as_yaml
from emomerge.experiment.merges import check_merge, merge_note, write_merge
from emomerge.experiment.outline import outline, outline_table, size
from emomerge.experiment.overfitting import overfits, snapshot_loss
from emomerge.experiment.stage import Facts, Stage
from emomerge.experiment.workspace import files_below, stopwatch
from emomerge.numerics.hashing import digest
from emomerge.numerics.threads import one_thread
from emomerge.probing.registry import recipe_metrics
from emomerge.progress import Display
from emomerge.recipe import Merge, Recipe, load_recipe
from emomerge.reporting import write_report
from emomerge.results import SCHEMA_VERSION, Results, load_results
from emomerge.training import (
    Engine,
    Loaded,
    Ranks,
    RunSpec,
    check_trackers,
    follow,
    train_in_workers,
    train_locally,
    train_runs,
)
from emomerge.training.early_ends import checks
from emomerge.training.trunk import branch_point
from emomerge.training.work import Work


class Pipeline(Experiment):
    """The stages of one recipe in one output folder.

    Args:
        recipe: the recipe.
        out: the output folder, created if necessary.
        display: shows progress; by default nothing is shown.
        command: the command line, for the report.
        engine: starts workers for runs and measurements; None does everything in this process.
        ranks: the processes started by torchrun; all but the first only `follow`.
        workers: without an engine, the number of processes that share the work; None lets the work decide.

    Raises:
        BadInput: a merge of the recipe has a parameter that its method does not have, or does not fit what it merges.
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
        workers: int | None = 1,
    ) -> None:
        for spec in recipe.merge:
            check_merge(recipe, spec)
        recipe_metrics(recipe.probe)  # refuses unknown metrics and options
        super().__init__(recipe, out, display=display, command=command)
        self.engine, self.ranks = engine, ranks
        self.crew = Crew(self, lambda: self.work, self.seconds_left, workers)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        space = self.space
        return [
            Stage("base", lambda: self.base_inputs, lambda: files_below(space.base), self.make_base),
            Stage("runs", None, list, self.train, self.runs_are_done, self.train),
            # Merges first: controls are meanwhile trained by workers, if there are any.
            *(self._merge_stage(spec, seed) for spec in self.recipe.merge for seed in self.recipe.runs.seeds),
            Stage("controls", lambda: controls_inputs(self), list, self.train_controls, self.controls_are_done),
            Stage("probe", lambda: self.probe_inputs, lambda: [space.results], self.probe, self.results_are_readable),
            Stage("report", lambda: self.report_inputs, lambda: [space.report, *files_below(space.figures)], self.report),
        ]

    def run(self) -> bool:
        """Complete all stages. Return False if there was nothing to do."""
        return self._complete(self.stages)

    def train_all(self, only: Sequence[str] = ()) -> bool:
        """Complete the base and the runs (of the optimizers in `only`, if given). Return False if there was nothing to do.

        Raises:
            BadInput: `only` excludes runs that the rounds need.
        """
        if only and self.recipe.runs.rounds > 1 and set(only) < set(self.recipe.runs.optimizers):
            raise BadInput(
                "rounds need all runs", where="runs.rounds", found=f"only {', '.join(only)}",
                fix="leave out --only, or set runs.optimizers",
            )  # fmt: skip
        chosen = [spec for spec in self.specs if not only or spec.optimizer in only]
        train = partial(self.train, chosen)
        runs = Stage("runs", None, list, train, lambda: all(map(self.run_is_done, chosen)) and not self.missing_rounds(), train)
        return self._complete([self.stages[0], runs])

    def _complete(self, stages: Sequence[Stage]) -> bool:
        with self.space.locked():
            todo = not all(stage.is_done(self.space) for stage in stages)
            if todo:
                with one_thread():
                    self._begin_with_plan(until=stages[-1].name)
                with self._hands(stages), self.display.live():
                    for stage in stages:
                        self.crew.look_ahead(stage.name)
                        stage.complete(self.space)
        return todo

    def status(self) -> dict[str, bool]:
        """Return whether each stage is up to date, in order."""
        return {stage.name: stage.is_done(self.space) for stage in self.stages}

    def follow(self) -> None:
        """Take part in the steps of every run, on all ranks but the first."""
        if self.ranks is not None:
            follow(self.ranks, self.task, lambda: self.data)

    def restart(self) -> None:
        """Delete the output of an earlier run from the folder."""
        with self.space.locked():
            self.space.clear()

    def begin(self) -> None:
        """Check all inputs before writing anything, then write the recipe.

        Raises:
            BadInput: the data are unusable, or the folder holds a `base` that emomerge did not make or another recipe's models.
        """
        given = Path(self.recipe.base.model).expanduser() if self.recipe.base.model else None
        if given is not None and given.exists() and given.resolve().is_relative_to(self.space.out.resolve()):
            raise BadInput("the base lies inside the output folder", where=given, fix="choose another -o")
        self._refuse_other_recipe()
        if self.space.base.exists() and not self.space.recipe.exists():
            raise BadInput(
                "this folder has a `base` that emomerge did not make", where=self.space.base, fix="choose another -o"
            )
        check_trackers(self.recipe.runs.log_with)
        _ = self.data
        atomic.write_text(self.space.recipe, as_yaml(self.recipe))
        self.space.remember(self.paths)

    def _refuse_other_recipe(self) -> None:
        """Raise BadInput if the folder holds what was trained by a recipe of another name, base or task."""
        if not self.space.recipe.exists() or not self.space.stamp("base"):
            return
        fix = "choose another -o, or delete what is there with `emomerge run --restart`"
        try:
            before = load_recipe(self.space.recipe)
        except BadInput as error:
            raise BadInput(
                "the recipe of what is in the folder cannot be read", where=self.space.out, found=error, fix=fix
            ) from None
        before = before.as_written(before.written | self.paths)
        for part in ("name", "base", "task"):
            if getattr(before, part) != getattr(self.as_written, part):
                wanted, found = _differing(self.as_written, part, before), _differing(before, part, self.as_written)
                what = f"the folder holds the models of a recipe with another {part}"
                raise BadInput(what, where=self.space.out, expected=wanted, found=found, fix=fix)

    def plan(self) -> dict[str, Any]:
        """Return what `run` would do (see `outline`), with estimates if the model is small or has been measured."""
        prepared = self.recipe.base.model is None or self.space.is_done("base", self.base_inputs)
        work = hands = None
        with contextlib.suppress(EmomergeError):  # what is wrong is said when it is run
            if prepared and self.device.type == "cpu":
                with one_thread():
                    work, hands = self.work, self.crew.choose()
        return outline(self, work, hands)

    def _begin_with_plan(self, until: str) -> None:
        """Check inputs and disk, and print what is about to be done.

        Raises:
            BadInput: see `begin`; or the disk is too small.
        """
        self.begin()
        if self.device.type != "cpu" or self.ranks is not None:  # where one pass here says little
            self.display.console.print(outline_table(outline(self, until=until)))
            return
        found = outline(self, self.work, None if self.engine is not None else self.crew.choose(), until=until)
        have = sum(file.stat().st_size for file in files_below(self.space.out))
        if found["disk"] - have > (free := shutil.disk_usage(self.space.out).free):
            raise BadInput(
                "the disk is too small", where=self.space.out, expected=f"{size(found['disk'] - have)} free", found=size(free),
                fix="choose another -o",
            )  # fmt: skip
        self.display.console.print(outline_table(found))

    def _hands(self, stages: Sequence[Stage]) -> contextlib.AbstractContextManager[None]:
        """Return the block in which threads and workers are chosen by the work, unless ranks or another engine have it."""
        if self.ranks is not None or self.engine is not None:
            return contextlib.nullcontext()
        return self.crew.at_work([stage.name for stage in stages])

    def seconds_left(self) -> float:
        """Return an estimate of the seconds that one worker needs for what is not done."""
        return float(outline(self, self.work)["seconds"])

    @cached_property
    def new_base(self) -> NewBase:
        """The base before it is trained."""
        return new_base(self)

    def make_base(self) -> Facts:
        """Train the base if the recipe says so, and write it."""
        facts = make_base(self, self.new_base)
        del self.new_base  # frees its memory
        return {**facts, "work": asdict(self.work)}

    @cached_property
    def work(self) -> Work:
        """What a pass of the runs costs; measured when the base is made, and kept in its stamp."""
        known = self.space.stamp("base").get("work")
        if known is not None and self.space.is_done("base", self.base_inputs):
            return Work(**known)
        return work_of(self, self.new_base)

    def train(self, specs: Sequence[RunSpec] | None = None) -> None:
        """Train runs, by default the shallow runs of the recipe, and show their progress."""
        specs = self.specs if specs is None else specs
        seeds = {spec.seed for spec in specs if spec.role == "run" and not self.run_is_done(spec)}
        trunks = [trunk for trunk in self.trunks if trunk.seed in seeds and branch_point(self.context, trunk) is None]
        lines = {
            spec.name: self.display.line(spec.name, spec.steps, "done" if self.run_is_done(spec) else "waiting", begun=False)
            for spec in [*trunks, *specs]
        }
        for spec in specs:
            if self.run_is_done(spec):
                lines[spec.name].at(spec.steps, f"loss {self.run_dir(spec).state['last_loss']:.4f}")
        if all(self.run_is_done(spec) for spec in specs):
            missing = set() if specs and specs[0].role == "control" else self.missing_rounds()
            if not missing:
                return
            if missing - {0, self.recipe.runs.kept_rounds[-1]}:  # the trunk's snapshot, and the mean of the finished runs
                self.display.say("training the runs again: a merge is made of their rounds, which were not kept")

        def on_step(spec: RunSpec, row: dict[str, Any]) -> None:
            if spec.name not in lines:  # the trunk, of which a round is missing
                lines[spec.name] = self.display.line(spec.name, spec.steps)
            lines[spec.name].at(row["step"], f"loss {row['loss']:.4f}  emoPulse {row['rate']:.2e}")

        loaded = Loaded()

        def execute(pieces: Sequence[RunSpec]) -> None:
            if self.engine is not None:
                train_in_workers(self.engine, self.context, pieces, on_step)
            else:
                first_round = all(spec.start == 0 for spec in pieces)
                say = self.display.say if first_round else lambda line: None  # every round would say the same
                train_locally(self.context, pieces, ranks=self.ranks, on_step=on_step, say=say, loaded=loaded)

        def has_overfitted(spec: RunSpec, step: int) -> bool:
            found = overfits(self.measurer, spec, step)
            if found:
                lines[spec.name].end()
            return found

        here = self.engine is None and self.ranks is None  # elsewhere a stop would cost as much as it saves
        train_runs(self.context, specs, execute, self._branch_point, has_overfitted if here else None)

    def _branch_point(self, trunk: RunSpec) -> int:
        """Return the step of a trunk with the lowest validation loss, of those at which it has not yet overfitted."""
        losses: dict[int, float] = {}
        for step in trunk.snapshots:
            losses[step] = snapshot_loss(self.measurer, trunk, step)
            if step in checks(trunk) and overfits(self.measurer, trunk, step):
                break
        best = min(losses, key=losses.__getitem__)
        self.say_if_stopped(trunk)
        self.display.say(f"{trunk.name}: the runs branch off at step {best} of {trunk.steps}, by validation loss")
        return best

    def runs_are_done(self) -> bool:
        """Return whether all shallow runs are up to date, and the rounds that merges are made of are kept."""
        return all(map(self.run_is_done, self.specs)) and not self.missing_rounds()

    def missing_rounds(self) -> set[int]:
        """Return the rounds that a merge is made of and that are not kept for every training seed."""
        wanted = self.recipe.runs.kept_rounds if self.recipe.merges_rounds else ()
        return {number for seed in self.recipe.runs.seeds for number in self.kept_rounds(seed).missing(wanted)}

    def train_controls(self) -> Facts:
        """Train the controls of the recipe."""
        meanwhile = measure_so_far(self)
        return train_controls(self, lambda group: None if self.crew.finish(group, meanwhile) else self.train(group))

    def controls_are_done(self) -> bool:
        """Return whether all trained controls are up to date."""
        return all(map(self.run_is_done, self.trained_controls))

    def _merge_stage(self, spec: Merge, seed: int) -> Stage:
        name = self.merge_name(spec, seed)

        def show() -> None:
            self.display.line(f"merge {name}", 1).at(1, merge_note(self, name))

        def do() -> None:
            line = self.display.line(f"merge {name}", 1)
            write_merge(self, spec, seed)
            self.space.forget("report")  # so that the model card is completed
            line.at(1, merge_note(self, name))

        def files() -> list[Path]:
            return [file for file in files_below(self.space.merges / name) if file.name != "README.md"]

        return Stage(f"merge-{name}", lambda: self.merge_stamp(spec, seed), files, do, show=show)

    @property
    def probe_inputs(self) -> str:
        """Return the hash of everything that is measured and of the results' schema."""
        recipe = self.recipe
        rivals = [self.run_dir(spec).state.get("sha256") for spec in self.trained_controls]
        shared = [recipe.name, self.merge_stamps(), rivals, recipe.probe, recipe.controls, recipe.select]
        return digest([*shared, SCHEMA_VERSION])

    @property
    def report_inputs(self) -> str:
        """Return the hash of everything that the report shows."""
        return digest([self.probe_inputs, version("emomerge")])

    def probe(self) -> None:
        """Measure all artefacts and write results.json."""
        if self.space.results.exists() and not self.results_are_readable():
            self.display.say(
                "results.json was written by another version or is damaged: measuring again, with remembered evaluations"
            )
        with stopwatch() as clock:
            results = collect_results(self, self.engine or self.crew.engine)
        results = results.model_copy(update={"seconds": seconds_of_stages(self) | {"probe": clock["seconds"]}})
        atomic.write_text(self.space.results, results.to_json())

    def report(self) -> None:
        """Write report.html, its figures as PNG, and the model cards with their results."""
        results = self.results()
        line = self.display.line("report", 1)
        write_report(results, self.space.report, png_dir=self.space.figures)
        write_cards(self, results)
        line.at(1, str(self.space.report))

    def results(self) -> Results:
        """Return the content of results.json."""
        return load_results(self.space.out)

    def results_are_readable(self) -> bool:
        """Return whether results.json can be read; a stamp only knows its size."""
        try:
            self.results()
        except BadInput:
            return False
        return True


def _differing(recipe: Recipe, part: str, other: Recipe) -> str:
    """Return the fields of a section that another recipe has otherwise."""
    here, there = (each.model_dump(mode="json")[part] for each in (recipe, other))
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return str(here)
    return ", ".join(f"{part}.{key}: {value}" for key, value in here.items() if key not in there or there[key] != value)
