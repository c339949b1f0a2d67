"""The controls that are trained: rivals of the merge that had as many steps as all its runs together."""

from __future__ import annotations

from emomerge.recipe import Recipe
from emomerge.training.runs import RunSpec


def long_run(recipe: Recipe, best: RunSpec) -> RunSpec:
    """The optimizer of a single run with the steps of all; on the way it leaves what `loss-matched` and `swa` are made of."""
    steps, kept = total_steps(recipe), recipe.rival.snapshots
    wanted = {"loss-matched", "swa"} & set(recipe.controls)
    snapshots = tuple(sorted({max(1, steps * k // kept) for k in range(1, kept + 1)})) if wanted else ()
    return RunSpec(f"long-{best.name}", best.optimizer, best.seed, steps, control="long-run", snapshots=snapshots)


def long_adamw_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """AdamW with cosine decay and the steps of all runs, once for each peak rate."""
    steps = total_steps(recipe)
    return [
        RunSpec(f"long-adamw-{rate:g}-{seed}", "adamw", seed, steps, control="adamw-long-run", rate=rate)
        for rate in recipe.rival.learning_rates
    ]


def adamw_members(recipe: Recipe, seed: int, rate: float) -> list[RunSpec]:
    """As many AdamW runs of the runs' own length as there are optimizers, in different orders of the data, to be averaged."""
    steps = recipe.runs.steps
    return [
        RunSpec(f"adamw-{rate:g}-{k}-{seed}", "adamw", seed, steps, control="adamw-average", rate=rate, member=k)
        for k in range(len(recipe.runs.optimizers))
    ]


def total_steps(recipe: Recipe) -> int:
    """Steps of all runs of one training seed together."""
    return recipe.runs.steps * len(recipe.runs.optimizers)
