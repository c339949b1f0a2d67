"""Run specifications: which runs a recipe asks for, and the hash of everything that decides the result of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe, Runs

Role = Literal["run", "control"]


@dataclass(frozen=True)
class RunSpec:
    """One run of a recipe, and the steps of it that are to be trained.

    Attributes:
        name: the name of the run's directory.
        optimizer: a name in `emomerge.optim.OPTIMIZERS`, or `adamw`.
        seed: training seed.
        steps: the whole step budget.
        control: the entry of the recipe's `controls` that this run serves; None for runs that are merged.
        rate: peak learning rate of AdamW; None for optimizers with an emoPulse.
        member: index among runs that differ only in the order of their batches.
        batch_factor: size of a batch, as a multiple of the recipe's.
        snapshots: steps after which the weights are kept.
        start: steps taken in earlier rounds.
        end: step at which this round ends; by default the whole budget.
    """

    name: str
    optimizer: str
    seed: int
    steps: int
    control: str | None = None
    rate: float | None = None
    member: int = 0
    batch_factor: int = 1
    snapshots: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.end or self.steps)

    @property
    def role(self) -> Role:
        """`run` if it is merged, else `control`."""
        return "run" if self.control is None else "control"

    def micro_batches(self, runs: Runs) -> int:
        """Return the number of micro-batches of a step, given the recipe's `runs`."""
        return runs.accumulation * self.batch_factor

    def max_grad_norm(self, recipe: Recipe) -> float | None:
        """Return the norm at which gradients are clipped; None for no clipping."""
        return recipe.rival.max_grad_norm if self.optimizer == "adamw" else recipe.runs.max_grad_norm


def planned_runs(recipe: Recipe) -> list[RunSpec]:
    """Return the shallow runs of a recipe: for each training seed, one per optimizer."""
    runs = recipe.runs
    return [RunSpec(f"{optimizer}-{seed}", optimizer, seed, runs.steps) for seed in runs.seeds for optimizer in runs.optimizers]


def round_ends(runs: Runs) -> list[int]:
    """Return the step at which each round ends."""
    return [runs.steps * number // runs.rounds for number in range(1, runs.rounds + 1)]


OFF: Mapping[str, object] = {"average": None, "early_stop": False, "cooldown": 0.0, "rounds": 1, "outer": None}
"""Options left out of the hash while they are off, so that runs trained before an option existed stay valid."""


def run_inputs(recipe: Recipe, spec: RunSpec, base_hash: str) -> str:
    """Return the hash of everything that decides a run's result. A finished run with the same hash is not trained again."""
    runs, control = recipe.runs, spec.role == "control"
    irrelevant = {
        "procedure",
        "optimizers",
        "seeds",
        "steps",
        "checkpoint_every",
        "sharding",
        "log_with",
        "parallel",
        "keep_rounds",
    }
    shared = runs.model_dump(mode="json", exclude=irrelevant)
    shared |= {"lr": runs.lr_of(spec.optimizer), "max_grad_norm": spec.max_grad_norm(recipe)}
    unused = {"rounds", "outer", "early_stop"} if control else set()  # controls use their whole budget in one round
    unused |= {"average", "cooldown"} if spec.rate is not None else set()
    for name, off in OFF.items():
        if name in unused or getattr(runs, name) == off:
            del shared[name]
    others = [runs.optimizers, [runs.lr_of(name) for name in runs.optimizers]] if "rounds" in shared else []
    of_a_control = [spec.rate, recipe.rival.weight_decay, spec.member, spec.snapshots] if control else []
    of_a_control += [spec.batch_factor] if spec.batch_factor != 1 else []
    return digest([base_hash, recipe.adapter, shared, spec.optimizer, spec.seed, spec.steps, *others, *of_a_control])
