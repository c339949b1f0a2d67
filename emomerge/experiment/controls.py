"""Training plans of the controls: runs with as many steps as all merged runs together, and others."""

from __future__ import annotations

from emomerge.recipe import Recipe
from emomerge.training import RunSpec


def long_run(recipe: Recipe, best: RunSpec) -> RunSpec:
    """Return the run of one optimizer with the steps of all runs, with the snapshots that `loss-matched` and `swa` need."""
    steps, kept = total_steps(recipe), recipe.rival.snapshots
    wanted = {"loss-matched", "swa"} & set(recipe.controls)
    snapshots = tuple(sorted({max(1, steps * k // kept) for k in range(1, kept + 1)})) if wanted else ()
    return RunSpec(f"long-{best.name}", best.optimizer, best.seed, steps, control="long-run", snapshots=snapshots)


def long_adamw_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """Return AdamW runs with cosine decay and the steps of all runs, one for each peak rate."""
    steps = total_steps(recipe)
    return [
        RunSpec(f"long-adamw-{rate:g}-{seed}", "adamw", seed, steps, control="adamw-long-run", rate=rate)
        for rate in recipe.rival.learning_rates
    ]


def adamw_members(recipe: Recipe, seed: int, rate: float) -> list[RunSpec]:
    """Return AdamW runs to be averaged: as many and as long as the merged runs, each with another order of the data."""
    steps = recipe.runs.steps
    return [
        RunSpec(f"adamw-{rate:g}-{k}-{seed}", "adamw", seed, steps, control="adamw-average", rate=rate, member=k)
        for k in range(len(recipe.runs.optimizers))
    ]


def total_steps(recipe: Recipe) -> int:
    """Return the number of steps of all runs of one training seed together."""
    return recipe.runs.steps * len(recipe.runs.optimizers)
