"""Which merge of five runs on one task is best on test data, when everything it chooses is chosen on validation data?

    apt-get install dataset-fashion-mnist                        # or --data FOLDER with the four IDX files
    python benchmarks/multi_positioning.py --cache out/mp        # about 6 minutes on one core, of which 2 train the runs
    python benchmarks/multi_positioning.py --cache out/mp --tasks digits --seeds 1

Three tasks: the recipe `digits` (ViT, LoRA), the recipe `fashion-mnist` (MLP, full fine-tuning, inverted pictures: a strong
shift) and the same without a shift from a base of 300 steps (mild). The runs are separate ones of the preset `guarded`,
trained by the recipes' own pipeline, once.

The first table gives test losses in nats, mean ± standard deviation over the training seeds, and over all tasks and seeds the
change against the best single run in per cent, how often the merge was better than that run, the held-out losses measured
(where it is learned: gradients), the runs' own not counted, and seconds. `c` are the coefficients of the runs; `learned` means
by gradient (L-BFGS); `one a block` has coefficients for each layer, drawn towards those for all.

The second table gives the change against the best single run where only so many validation rows are there to choose by, the
third where the search ends at other predicted gains than `positioning.MIN_GAIN`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call

from emomerge.checkpoints import Checkpoint, load_into
from emomerge.experiment.pipeline import Pipeline
from emomerge.merging import merge
from emomerge.merging.methods import positioning
from emomerge.merging.methods.spectral import svd
from emomerge.merging.methods.tall_mask import mask_of
from emomerge.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
TASKS = {
    "digits": ("digits.yaml", []),
    "fashion, strong": ("fashion-mnist.yaml", []),
    "fashion, mild": ("fashion-mnist.yaml", ["task.transform={}", "base.prepare.steps=300"]),
}
ROWS = (64, 128, 256, 512, 1000, 2000)
RIDGE = 1e-2
"""Draws the coefficients of blocks towards those for all."""

State = dict[str, Tensor]


class Outcome(NamedTuple):
    """Losses of a merge, and how many were measured to find it."""

    validation: float
    test: float
    evaluations: int = 0


class Study:
    """The runs of one task and training seed, and the loss of anything on both splits."""

    def __init__(self, pipeline: Pipeline, seed: int, rows: int | None = None) -> None:
        """With `rows`, choices see only so many of the validation split, drawn with the training seed."""
        self.pipeline, self.model, self.base = pipeline, pipeline.measurer.model, pipeline.base
        self.runs = [pipeline.run_artefact(spec).checkpoint for spec in pipeline.specs if spec.seed == seed]
        splits = pipeline.data
        count = len(splits.validation)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:rows]
        self.validation, self.test = splits.validation.batch(drawn), splits.test.batch(range(len(splits.test)))
        self.asked = 0
        self.losses = [self.held_out(run) for run in self.runs]

    def held_out(self, checkpoint: Checkpoint) -> float:
        """What methods choose by."""
        self.asked += 1
        return self._loss(checkpoint, self.validation)

    def _loss(self, checkpoint: Checkpoint, batch: State) -> float:
        load_into(self.model, checkpoint)
        with torch.inference_mode():
            return float(self.cross_entropy({}, batch))

    def cross_entropy(self, state: State, batch: State) -> Tensor:
        """The loss of the live model with other weights."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return F.cross_entropy(functional_call(self.model, state, (), inputs).logits, batch["labels"])

    def outcome(self, checkpoint: Checkpoint, asked: int = 0) -> Outcome:
        """Of weights."""
        return Outcome(self._loss(checkpoint, self.validation), self._loss(checkpoint, self.test), asked)

    @torch.no_grad()
    def outcome_of(self, state: State, asked: int) -> Outcome:
        """Of the live model's weights."""
        splits = (self.validation, self.test)
        return Outcome(*(float(self.cross_entropy(state, split)) for split in splits), asked)

    @cached_property
    def theta(self) -> tuple[State, State]:
        """θ₀, and the τ_t (runs, *shape) of what moves, under the live model's names."""

        def live(checkpoint: Checkpoint) -> State:
            load_into(self.model, checkpoint)
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

        base, runs = live(self.base), [live(run) for run in self.runs]
        taus = {name: torch.stack([run[name] - base[name] for run in runs]) for name in base}
        return base, {name: tau for name, tau in taus.items() if tau.any()}


Contestant = Callable[[Study], Outcome]


def by_method(method: str, **params: Any) -> Contestant:
    """One of emomerge's methods."""

    def contest(study: Study) -> Outcome:
        study.asked = 0
        merged = merge(study.base, study.runs, method=method, held_out_loss=study.held_out, run_losses=study.losses, **params)
        return study.outcome(merged, study.asked)

    return contest


def best_single(study: Study) -> Outcome:
    return study.outcome(study.runs[study.losses.index(min(study.losses))])


# ------------------------------------------------------------------------------------------------- learned coefficients


def blocks_of(names: Sequence[str]) -> dict[str, str]:
    """name → its layer: everything up to the first number."""
    return {name: (re.match(r".*?\.\d+(?=\.)", name) or re.match(r"[^.]*", name))[0] for name in names}


def combined(study: Study, coefficients: dict[str, Tensor]) -> State:
    """θ₀ + Σ_t c_t τ_t, with coefficients (runs,) by name."""
    base, taus = study.theta
    return {name: base[name] + torch.tensordot(coefficients[name], tau, dims=1) for name, tau in taus.items()}


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, int]:
    """By L-BFGS; the minimum and the number of gradients."""
    x, gradients = start.clone().requires_grad_(), 0
    optimizer = torch.optim.LBFGS([x], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        nonlocal gradients
        gradients += 1
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return x.detach(), gradients


def learn(study: Study, by_block: bool) -> Outcome:
    """Coefficients by gradient from the best run, in units in which all task vectors are as long as its; safe-guarded."""
    _, taus = study.theta
    best = study.losses.index(min(study.losses))
    lengths = sum(tau.flatten(1).square().sum(1) for tau in taus.values()).sqrt()
    unit = lengths[best] / lengths
    start = torch.eye(len(lengths))[best] / unit

    def loss_of_all(x: Tensor) -> Tensor:
        return study.cross_entropy(combined(study, dict.fromkeys(taus, x * unit)), study.validation)

    x, gradients = minimise(loss_of_all, start)
    if not loss_of_all(x) < loss_of_all(start):
        x = start
    blocks = blocks_of(list(taus))
    rows = {block: row for row, block in enumerate(dict.fromkeys(blocks.values()))} if by_block else {}
    if by_block:
        centre = x

        def loss_of_blocks(x: Tensor) -> Tensor:
            coefficients = {name: x[rows[block]] * unit for name, block in blocks.items()}
            away = (x - centre).square().sum()
            return study.cross_entropy(combined(study, coefficients), study.validation) + RIDGE * away

        x, more = minimise(loss_of_blocks, centre.repeat(len(rows), 1))
        gradients += more
    coefficients = {name: (x[rows[block]] if by_block else x) * unit for name, block in blocks.items()}
    return study.outcome_of(combined(study, coefficients), gradients)


# ------------------------------------------------------------------------------------------------------- masks, SeedLoRA


def mask(tau: Tensor, reference: Tensor) -> Tensor:
    """What at least two runs' masks keep of a reference at λ = 0.4."""
    return mask_of(tau, reference, 0.4).sum(0) >= 2


def masked_positioning(study: Study, after: bool) -> Outcome:
    """`positioning` of task vectors that are masked, or of combinations that are."""
    base, taus = study.theta
    if not after:
        taus = {name: tau * mask(tau, tau.mean(0)) for name, tau in taus.items()}
    flat = torch.cat([tau.flatten(1) for tau in taus.values()], dim=1).double()

    def state(c: Tensor) -> State:
        moves = {name: torch.tensordot(c.float(), tau, dims=1) for name, tau in taus.items()}
        return {name: base[name] + (r * mask(taus[name], r) if after else r) for name, r in moves.items()}

    @torch.no_grad()
    def loss(c: Tensor) -> float:
        return float(study.cross_entropy(state(c), study.validation))

    search = positioning.Search(loss)
    for c in (*torch.eye(len(flat)).double(), torch.full((len(flat),), 1 / len(flat)).double()):
        search.measure(c)
    positioning.descend(search, positioning.axes(flat @ flat.T, search.best), 40)
    return study.outcome_of(state(search.best), len(search.losses) - len(flat))


def seed_lora(study: Study) -> Outcome:
    """After SeedLoRA (Liu et al. 2025): where all runs agree in sign their mean; elsewhere the runs' mean coordinates in
    the leading singular vectors of all runs side by side, as many as an adapter's rank; scale by validation loss."""
    base, taus = study.theta
    rank = study.pipeline.recipe.adapter.rank
    fused = {}
    for name, tau in taus.items():
        mean = tau.mean(0)
        if mean.ndim != 2:
            fused[name] = mean
            continue
        left = svd(torch.cat(list(tau), dim=1)).u[:, :rank]
        right = svd(torch.cat(list(tau), dim=0)).v[:, :rank]
        agreed = tau.sign().sum(0).abs() == len(tau)
        fused[name] = torch.where(agreed, mean, left @ (left.T @ mean @ right) @ right.T)
    scales = [step / 10 for step in range(1, 16)]
    states = [{name: base[name] + scale * tau for name, tau in fused.items()} for scale in scales]
    with torch.no_grad():
        losses = [float(study.cross_entropy(state, study.validation)) for state in states]
    return study.outcome_of(states[losses.index(min(losses))], len(scales))


SINGLE, OURS = "best single run", "positioning"
LEARNED, BLOCKS = "c learned", "c learned, one a block"
CONTESTANTS: dict[str, Contestant] = {
    SINGLE: best_single,
    "mean": by_method("mean"),
    "softmax weights": by_method("mean", weights="auto"),
    "softmax weights, scale": by_method("mean", weights="auto", scale="auto"),
    "greedy soup": by_method("greedy-soup"),
    "greedy soup, scale": by_method("greedy-soup", scale="auto"),
    "task-arithmetic, scale": by_method("task-arithmetic", scale="auto"),
    "tall-mask": by_method("tall-mask"),
    "ties": by_method("ties"),
    "ties, scale": by_method("ties", scale="auto"),
    "model-stock": by_method("model-stock"),
    "karcher": by_method("karcher"),
    "SeedLoRA-style, scale": seed_lora,
    OURS: by_method("positioning"),
    "positioning, 20 more losses": by_method("positioning", evaluations=60),
    "mask, then positioning": lambda study: masked_positioning(study, after=False),
    "positioning, then mask": lambda study: masked_positioning(study, after=True),
    LEARNED: lambda study: learn(study, by_block=False),
    BLOCKS: lambda study: learn(study, by_block=True),
}
SWEPT = (OURS, LEARNED, BLOCKS)


def spread(values: Sequence[float], form: str) -> str:
    text = format(statistics.fmean(values), form)
    return f"{text} ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else text


def change(outcome: Outcome, single: Outcome) -> float:
    """Of the test loss, in per cent."""
    return 100 * (outcome.test / single.test - 1)


def prepare(task: str, seeds: int, cache: Path, data: Path) -> Pipeline:
    """The base and the runs of every seed, trained unless they are there."""
    file, settings = TASKS[task]
    settings = [*settings, "runs.procedure=paper", "runs.preset=guarded", f"runs.seeds={list(range(seeds))}", "controls=[]"]
    if file.startswith("fashion"):
        settings.append(f"task.train={data}")
    pipeline = Pipeline(load_recipe(RECIPES / file, settings), cache / task.replace(", ", "-"))
    pipeline.train_all()
    return pipeline


def compare(pipelines: dict[str, Pipeline], seeds: int) -> tuple[Table, str]:
    """Every contestant on every task and seed; the table and the verdict."""
    found: dict[str, dict[tuple[str, int], Outcome]] = defaultdict(dict)
    seconds: dict[str, list[float]] = defaultdict(list)
    for task, pipeline in pipelines.items():
        for seed in range(seeds):
            study = Study(pipeline, seed)
            _ = study.theta
            for name, contest in CONTESTANTS.items():
                if contest is seed_lora and pipeline.recipe.adapter.kind != "lora":
                    continue
                begun = time.perf_counter()
                found[name][task, seed] = contest(study)
                seconds[name].append(time.perf_counter() - begun)
    table = Table("merge", *pipelines, "change, %", "better", "losses", "s")
    changes = {}
    for name, outcomes in found.items():
        cells = []
        for task in pipelines:
            losses = [outcome.test for (of, _), outcome in outcomes.items() if of == task]
            cells.append(spread(losses, ".3f") if losses else "")
        changes[name] = [change(outcome, found[SINGLE][key]) for key, outcome in outcomes.items()]
        better = sum(value < 0 for value in changes[name])
        asked = statistics.fmean(outcome.evaluations for outcome in outcomes.values())
        table.add_row(
            name,
            *cells,
            spread(changes[name], "+.1f"),
            f"{better} of {len(outcomes)}",
            f"{asked:.0f}",
            f"{statistics.fmean(seconds[name]):.1f}",
        )
    whole = [name for name in changes if name != SINGLE and len(changes[name]) == len(changes[SINGLE])]
    means = {name: statistics.fmean(changes[name]) for name in whole}
    house = min((name for name in whole if "positioning" not in name and name not in SWEPT), key=means.__getitem__)
    best = min(whole, key=means.__getitem__)
    verdict = (
        f"Lowest: {best} ({means[best]:+.1f} %); positioning {means[OURS]:+.1f} %, with gradients {means[LEARNED]:+.1f} %, "
        f"one a block {means[BLOCKS]:+.1f} %; of the other methods {house} ({means[house]:+.1f} %)."
    )
    return table, verdict


def sweep(pipelines: dict[str, Pipeline], seeds: int) -> Table:
    """How many validation rows coefficients need."""
    table = Table("rows", "cases", *(f"{name}: change, %" for name in SWEPT), *(f"{name}: better" for name in SWEPT))
    for rows in ROWS:
        changes: dict[str, list[float]] = defaultdict(list)
        for pipeline in pipelines.values():
            if len(pipeline.data.validation) < rows:
                continue
            for seed in range(seeds):
                study = Study(pipeline, seed, rows)
                single = best_single(study)
                for name in SWEPT:
                    changes[name].append(change(CONTESTANTS[name](study), single))
        if changes:
            better = [str(sum(value < 0 for value in changes[name])) for name in SWEPT]
            count = len(changes[OURS])
            table.add_row(str(rows), str(count), *(spread(changes[name], "+.1f") for name in SWEPT), *better)
    return table


def gains(pipelines: dict[str, Pipeline], seeds: int) -> Table:
    """How small a gain is worth another evaluation."""
    table = Table("rows", "smallest gain", "test: change, %", "validation: change, %", "losses")
    for rows in (None, 100, 256):
        studies = [Study(pipeline, seed, rows) for pipeline in pipelines.values() for seed in range(seeds)]
        for gain in (1e-6, 1e-3, 2e-3, 5e-3):
            with patch.object(positioning, "descend", partial(positioning.descend, min_gain=gain)):
                pairs = [(CONTESTANTS[OURS](study), best_single(study)) for study in studies]
            validation = [100 * (ours.validation / single.validation - 1) for ours, single in pairs]
            asked = statistics.fmean(ours.evaluations for ours, _ in pairs)
            changes = spread([change(*pair) for pair in pairs], "+.1f")
            table.add_row(str(rows or "all"), f"{gain:g}", changes, f"{statistics.fmean(validation):+.1f}", f"{asked:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the trained runs; made, and used again")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the IDX files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--no-sweep", action="store_true", help="leave the second and the third table out")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the products are too small to share
    console = Console(width=160)
    pipelines = {task: prepare(task, args.seeds, args.cache, args.data) for task in args.tasks}
    table, verdict = compare(pipelines, args.seeds)
    console.print(table)
    console.print(verdict)
    if not args.no_sweep:
        console.print(sweep(pipelines, args.seeds))
        console.print(gains(pipelines, args.seeds))


if __name__ == "__main__":
    main()
