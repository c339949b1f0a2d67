"""Do rounds help, and what is the distance to the rivals? Five runs that meet at their mean, on FashionMNIST.

    apt-get install dataset-fashion-mnist                     # or --data FOLDER with the four IDX files
    python benchmarks/rounds.py --cache out/rounds            # about 15 minutes on one core; continues where it was stopped
    python benchmarks/rounds.py --cache out/rounds --adaptations mild --seeds 1 --rounds 1 6
    python benchmarks/rounds.py --cache out/rounds --lora     # LoRA: what the mean of the factors loses, on the digits

Two adaptations of an MLP 784-128-10: mild (the same pictures, from a base of 300 steps) and strong (inverted ones, from a base
of 1,500). Five runs of 300 steps of 64 rows, one an optimizer, in orders of their own, preset `guarded`.

The first tables of an adaptation give the test loss (nats, mean ± standard deviation over the training seeds) of the plain mean
of the five after the last round: of their last weights, and of their averages over the last half of the last round (LAWA). The
next starts at the setting with the lowest validation loss and tries changes one after the other; what lowers it is kept. The
last has the rivals, AdamW with cosine decay at the best of four peak rates, clipped or not, by validation loss: with the 300
steps of one run; with as many as the five runs cost in CPU time (measured here, all taking turns); with 300 steps of five times
the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from emomerge.checkpoints import Checkpoint, load_into, open_checkpoint
from emomerge.experiment.pipeline import Pipeline
from emomerge.merging import merge
from emomerge.recipe import FAMILY, Recipe, Runs, load_recipe
from emomerge.training import RunDir, RunSpec, planned_runs, train_locally, train_runs
from emomerge.training.run import build_optimizer

RECIPES = Path(__file__).parent.parent / "recipes"
ADAPTATIONS = {"mild": ["task.transform={}", "base.prepare.steps=300"], "strong": []}
STEPS, BATCH = 300, 64
PEAKS = (3e-4, 1e-3, 3e-3, 1e-2)
CHANGES: list[Setting] = [
    {"outer": {"momentum": 0.9}}, {"data_order": "same"}, {"preset": "v3.8"}, {"max_grad_norm": 1.0}, {"max_grad_norm": 0.3},
    {"lr": 6.0}, {"cooldown": 0.5}, {"cooldown": 0.25},
]  # fmt: skip
Setting = dict[str, Any]
"""Fields of `runs`."""


class Loss(NamedTuple):
    """Nats."""

    validation: float
    test: float


class Study:
    """One adaptation: its base, and what was trained from it."""

    def __init__(self, name: str, recipe: Recipe, cache: Path, seeds: int) -> None:
        self.name, self.seeds, self.folder = name, tuple(range(seeds)), cache / name
        self.pipeline = Pipeline(recipe, self.folder / "base")
        self.pipeline.begin()
        self.pipeline.stages[0].complete(self.pipeline.space)
        self._log = self.folder / "losses.jsonl"
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._known: dict[str, Any] = {key: value for line in lines for key, value in json.loads(line).items()}

    def losses(self, setting: Setting) -> dict[str, list[Loss]]:
        """Of the mean of the runs' last weights and of the mean of their averages, for each training seed."""
        return self._remembered({"setting": setting}, lambda: self._train(setting))

    def rival(self, rate: float, clip: float | None, steps: int, batch: int) -> list[Loss]:
        """AdamW with cosine decay, for each training seed."""
        what = {"adamw": [rate, clip, steps, batch]}
        return self._remembered(what, lambda: {"adamw": self._train_rival(rate, clip, steps, batch)})["adamw"]

    def _remembered(self, what: dict[str, Any], train: Callable[[], dict[str, list[Loss]]]) -> dict[str, list[Loss]]:
        key = json.dumps([what, self.seeds])
        if key not in self._known:
            found = train()
            with self._log.open("a") as log:
                log.write(json.dumps({key: found}) + "\n")
            self._known[key] = found
        return {name: [Loss(*pair) for pair in pairs] for name, pairs in self._known[key].items()}

    def _recipe(self, **runs: Any) -> Recipe:
        fields = {
            "steps": STEPS,
            "batch_size": BATCH,
            "seeds": self.seeds,
            "data_order": "different",
            "average": "lawa",
            **runs,
        }
        return self.pipeline.recipe.model_copy(update={"runs": Runs(**fields)})

    def _train(self, setting: Setting) -> dict[str, list[Loss]]:
        recipe = self._recipe(**setting)
        specs, folder = planned_runs(recipe), self.folder / json.dumps(setting)
        self._execute(recipe, specs, folder)
        found: dict[str, list[Loss]] = {"last": [], "average": []}
        for kind, name in (("last", "model"), ("average", "model-average")):
            for seed in self.seeds:
                runs = [open_checkpoint(RunDir(folder / spec.name).path / name) for spec in specs if spec.seed == seed]
                found[kind].append(self.loss(merge(self.pipeline.base, runs, method="mean")))
        return found

    def _train_rival(self, rate: float, clip: float | None, steps: int, batch: int) -> list[Loss]:
        specs = [RunSpec(f"adamw-{s}", "adamw", s, steps, control="adamw-long-run", rate=rate) for s in self.seeds]
        folder = self.folder / f"adamw-{rate:g}-{clip}-{steps}-{batch}"
        self._execute(self._recipe(batch_size=batch, max_grad_norm=clip), specs, folder)
        return [self.loss(open_checkpoint(RunDir(folder / spec.name).artefact)) for spec in specs]

    def _execute(self, recipe: Recipe, specs: Sequence[RunSpec], folder: Path) -> None:
        made = self.pipeline
        context = replace(made.context, recipe=recipe, folder=folder).using(made.task, made.data)
        train_runs(context, specs, partial(train_locally, context))

    @torch.inference_mode()
    def loss(self, checkpoint: Checkpoint) -> Loss:
        """On both splits that nothing is trained on."""
        load_into(self.pipeline.measurer.model, checkpoint)
        return Loss(*(float(F.cross_entropy(self._logits(pixels), labels)) for pixels, labels in self._splits))

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.pipeline.measurer.model(pixel_values=pixels).logits

    @cached_property
    def _splits(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = [split.batch(range(len(split))) for split in (self.pipeline.data.validation, self.pipeline.data.test)]
        return [(batch["pixel_values"], batch["labels"]) for batch in batches]

    def steps_of_equal_cost(self) -> int:
        """So many steps of AdamW take the CPU time of the five runs: the median of five turns of 100 steps each."""
        made, recipe = self.pipeline, self._recipe()
        specs = planned_runs(recipe)[: len(FAMILY)]
        rival = RunSpec("adamw", "adamw", 0, STEPS, control="adamw-long-run", rate=1e-3)
        model = made.task.reload_model(made.space.base).train()
        batch = made.data.train.batch(range(BATCH))

        def seconds(spec: RunSpec) -> float:
            optimizer = build_optimizer(list(model.parameters()), recipe, spec)
            started = time.process_time()
            for _ in range(100):
                loss = made.task.loss(model, batch)
                loss.backward()
                optimizer.observe(loss)
                optimizer.step()
                optimizer.zero_grad()
            return time.process_time() - started

        ratios = [sum(map(seconds, specs)) / seconds(rival) for _ in range(5)]
        return round(STEPS * statistics.median(ratios))


def spread(losses: Sequence[Loss]) -> str:
    """Mean and standard deviation of the test losses."""
    values = [loss.test for loss in losses]
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def validation(losses: Sequence[Loss]) -> float:
    """What choices are made by."""
    return statistics.fmean(loss.validation for loss in losses)


def name_of(setting: Setting) -> str:
    """For people."""
    return ", ".join(f"{key} {value['momentum'] if key == 'outer' else value}" for key, value in setting.items())


class Found(NamedTuple):
    """A setting, whether the runs' last weights or their averages count, and its losses."""

    setting: Setting
    kind: str
    losses: list[Loss]

    def __str__(self) -> str:
        return f"{name_of(self.setting)}, {self.kind}"


def by_rounds(study: Study, rounds: Sequence[int], console: Console) -> Found:
    """Tables of every number of rounds; the best cell."""
    columns: dict[str, Setting] = {
        "lr 1": {"lr": 1.0},
        "lr 3": {"lr": 3.0},
        "lr 1, outer .5": {"lr": 1.0, "outer": {"momentum": 0.5}},
        "lr 3, outer .5": {"lr": 3.0, "outer": {"momentum": 0.5}},
    }
    found = []
    for kind in ("last", "average"):
        table = Table("rounds", *columns, title=f"{study.name}: test loss of the mean of the runs' {kind} weights")
        for number in rounds:
            cells = ["–"] * len(columns)
            for place, options in enumerate(columns.values()):
                if number > 1 or "outer" not in options:
                    setting = {"rounds": number, **options}
                    found.append(Found(setting, kind, study.losses(setting)[kind]))
                    cells[place] = spread(found[-1].losses)
            table.add_row(str(number), *cells)
        console.print(table)
    return min(found, key=lambda one: validation(one.losses))


def improve(study: Study, best: Found, console: Console) -> Found:
    """Table of changes tried one after the other; what is left of them."""
    table = Table("setting", "validation", "test", title=f"{study.name}: from the best of these")

    def show(title: str, losses: list[Loss]) -> None:
        table.add_row(title, f"{validation(losses):.3f}", spread(losses))

    show(str(best), best.losses)
    for change in CHANGES:
        if "outer" in change and best.setting["rounds"] == 1:
            continue
        other = best._replace(setting={**best.setting, **change}, losses=study.losses({**best.setting, **change})[best.kind])
        better = validation(other.losses) < validation(best.losses)
        show(f"with {name_of(change)}{', kept' if better else ''}", other.losses)
        best = other if better else best
    alone = {"rounds": 1} | {key: value for key, value in best.setting.items() if key not in ("rounds", "outer")}
    show("with all that is kept, in one round", study.losses(alone)[best.kind])
    console.print(table)
    return best


def against_rivals(study: Study, best: Found, console: Console) -> None:
    """Table of the rivals at their best, and the distance to them."""
    rivals = {
        f"{STEPS} steps": (STEPS, BATCH),
        "equal CPU time": (study.steps_of_equal_cost(), BATCH),
        f"{STEPS} steps of {5 * BATCH} rows": (STEPS, 5 * BATCH),
    }
    test = statistics.fmean(loss.test for loss in best.losses)
    table = Table("AdamW, cosine", "steps", "peak", "clipped at", "test", "best − it", title=f"{study.name}: {best}")
    for title, (steps, batch) in rivals.items():
        runs = {(rate, clip): study.rival(rate, clip, steps, batch) for rate in PEAKS for clip in (None, 1.0)}
        rate, clip = min(runs, key=lambda options: validation(runs[options]))
        losses = runs[rate, clip]
        difference = test - statistics.fmean(loss.test for loss in losses)
        table.add_row(title, str(steps), f"{rate:g}", str(clip or "–"), spread(losses), f"{difference:+.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the IDX files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for runs and losses")
    parser.add_argument("--adaptations", nargs="+", choices=ADAPTATIONS, default=list(ADAPTATIONS))
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3, 6, 15, 30])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the products are too small to share
    console = Console(width=120)
    for name in args.adaptations:
        overrides = [*ADAPTATIONS[name], f"task.train={args.data}"]
        study = Study(name, load_recipe(RECIPES / "fashion-mnist.yaml", overrides), args.cache, args.seeds)
        best = improve(study, by_rounds(study, args.rounds, console), console)
        against_rivals(study, best, console)


if __name__ == "__main__":
    main()
