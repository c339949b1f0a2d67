"""How LoRA runs should meet between rounds: at the mean of their factors, or at that of their products?

    python benchmarks/lora_meetings.py --cache out/lora-meetings        # about 10 minutes on one core; continues

The recipe `digits` (ViT, LoRA of rank 8), five runs of 300 steps, one an optimizer, in orders of their own, preset `guarded`
with emoScope 3, no outer momentum. With `factors`, which is what emomerge does, each meeting takes the means of A and of B;
with `product` the mean of B·A, cut to rank 8 by its singular values and split evenly into new factors. The optimizers keep
their states in both.

Printed are, for each number of rounds (mean ± standard deviation over the training seeds), the test loss of the exact mean
after the last round and of the mean of the factors, and how far apart these are: ‖mean(B·A) − mean(B)·mean(A)‖ / ‖mean(B·A)‖.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge.adapters import open_run
from emomerge.checkpoints import Checkpoint, load_into
from emomerge.experiment.pipeline import Pipeline
from emomerge.merging import merge
from emomerge.recipe import Runs, load_recipe
from emomerge.training import RunDir, planned_runs, rounds, train_locally, train_runs
from emomerge.training.state import load_state, of_kind

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.yaml"
mean_of_factors = rounds.mean_weights


def mean_of_products(checkpoints: Sequence[tuple[Path, str]], step: int) -> tuple[dict[str, Tensor], list[str]]:
    """The other meeting: B·A averaged over the runs, its best approximation of the factors' rank, √S to either side."""
    mean, buffers = mean_of_factors(checkpoints, step)
    states = [load_state(file, inputs) for file, inputs in checkpoints]
    runs = [of_kind(state[1], "model") for state in states if state is not None]
    for name in [name for name in mean if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        u, s, v = torch.linalg.svd(torch.stack([run[other] @ run[name] for run in runs]).mean(0), full_matrices=False)
        rank = len(mean[name])
        root = s[:rank].sqrt()
        mean[other], mean[name] = u[:, :rank] * root, root[:, None] * v[:rank]
    return mean, buffers


MEETINGS = {"factors": mean_of_factors, "product": mean_of_products}


class Study:
    """The base of the recipe and what was trained from it."""

    def __init__(self, cache: Path, seeds: int) -> None:
        self.seeds, self.cache = range(seeds), cache
        self.pipeline = Pipeline(load_recipe(RECIPE), cache / "base")
        self.pipeline.begin()
        self.pipeline.stages[0].complete(self.pipeline.space)
        test = self.pipeline.data.test
        self.batch = test.batch(range(len(test)))

    def train(self, number: int, meeting: str) -> list[tuple[float, float, float]]:
        """For each training seed the loss of the exact mean, that of the mean of the factors, and their distance."""
        made = self.pipeline
        fields = {"procedure": "paper", "preset": "guarded", "lr": 3.0, "data_order": "different", "batch_size": 32}
        runs = Runs(**fields, seeds=tuple(self.seeds), rounds=number)
        recipe = made.recipe.model_copy(update={"runs": runs})
        specs, folder = planned_runs(recipe), self.cache / f"{meeting}-{number}"
        context = replace(made.context, recipe=recipe, folder=folder).using(made.task, made.data)
        rounds.mean_weights = MEETINGS[meeting]
        train_runs(context, specs, partial(train_locally, context))
        return [
            self._compare([RunDir(folder / spec.name).artefact for spec in specs if spec.seed == seed]) for seed in self.seeds
        ]

    def _compare(self, adapters: Sequence[Path]) -> tuple[float, float, float]:
        base = self.pipeline.base
        exact = merge(base, adapters, method="mean")
        averaged = adapters[0].parent.parent / "averaged"
        shutil.copytree(adapters[0], averaged, dirs_exist_ok=True)
        states = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
        means = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        save_file(means, averaged / "adapter_model.safetensors")
        factors = open_run(base, averaged)
        apart, length = (
            sum(float((a[name] - b[name]).square().sum()) for name in base) for a, b in ((exact, factors), (exact, base))
        )
        return self.loss(exact), self.loss(factors), (apart / length) ** 0.5

    @torch.inference_mode()
    def loss(self, checkpoint: Checkpoint) -> float:
        """On the test split, in nats."""
        model = self.pipeline.measurer.model
        load_into(model, checkpoint)
        return float(F.cross_entropy(model(pixel_values=self.batch["pixel_values"]).logits, self.batch["labels"]))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3, 6, 15])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()

    torch.set_num_threads(1)
    study = Study(args.cache, args.seeds)
    table = Table("rounds", "meeting", "loss of the exact mean", "loss of the factors' mean", "distance")
    for number in args.rounds:
        for meeting in MEETINGS if number > 1 else ["factors"]:
            columns = zip(*study.train(number, meeting), strict=True)
            table.add_row(str(number), meeting if number > 1 else "–", *map(spread, columns))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
