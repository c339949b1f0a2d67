"""Run specifications: which runs a recipe asks for, and the hash of everything that decides the result of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe, Runs

Role = Literal["run", "control", "trunk"]
SNAPSHOTS = 8
"""Number of steps at which runs can branch off from a trunk: its last one and halves of it, since small data overfit early."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a recipe, and the steps of it that are to be trained.

    Attributes:
        name: the name of the run's directory.
        optimizer: a name in `emomerge.optim.OPTIMIZERS`, or `adamw`.
        seed: training seed.
        steps: the whole step budget.
        control: the entry of the recipe's `controls` that this run serves; None for runs that are merged.
        is_trunk: whether the merged runs of its seed branch off from this one.
        rate: peak learning rate of AdamW; None for optimizers with an emoPulse.
        member: index among runs that differ only in the order of their batches.
        batch_factor: size of a batch, as a multiple of the recipe's.
        snapshots: steps after which the weights are kept.
        ends_early: whether the run may end before its budget is spent, where it has plainly overfitted.
        start: steps taken in earlier rounds.
        end: step at which this round ends; by default the whole budget.
        is_stopped: whether the run is over at `end`, although it has steps left.
    """

    name: str
    optimizer: str
    seed: int
    steps: int
    control: str | None = None
    is_trunk: bool = False
    rate: float | None = None
    member: int = 0
    batch_factor: int = 1
    snapshots: tuple[int, ...] = ()
    ends_early: bool = False
    start: int = 0
    end: int = 0
    is_stopped: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.end or self.steps)

    @property
    def role(self) -> Role:
        """`run` if it is merged; `trunk` if such runs branch off from it; else `control`."""
        return "trunk" if self.is_trunk else "run" if self.control is None else "control"

    @property
    def is_last_round(self) -> bool:
        """Whether the run is done at `end`."""
        return self.is_stopped or self.end == self.steps

    @property
    def is_averaged(self) -> bool:
        """Whether `runs.average` applies to it."""
        return self.rate is None and not self.is_trunk

    def cooldown(self, runs: Runs) -> float:
        """Return the share of the steps over which emoPulse falls to 0, given the recipe's `runs`."""
        return 0.0 if self.is_trunk else runs.cooldown

    def micro_batches(self, runs: Runs) -> int:
        """Return the number of micro-batches of a step, given the recipe's `runs`."""
        return runs.accumulation * self.batch_factor

    def max_grad_norm(self, recipe: Recipe) -> float | None:
        """Return the norm at which gradients are clipped; None for no clipping."""
        return recipe.rival.max_grad_norm if self.optimizer == "adamw" else recipe.runs.max_grad_norm


def planned_runs(recipe: Recipe) -> list[RunSpec]:
    """Return the shallow runs of a recipe: for each training seed, one per optimizer."""
    runs, steps = recipe.runs, recipe.runs.own_steps
    return [RunSpec(f"{optimizer}-{seed}", optimizer, seed, steps) for seed in runs.seeds for optimizer in runs.optimizers]


def planned_trunks(recipe: Recipe) -> list[RunSpec]:
    """Return the run of each training seed from which its shallow runs branch off; none if they start from the base."""
    runs, steps = recipe.runs, recipe.runs.trunk_steps
    snapshots = tuple(sorted({max(1, steps >> halvings) for halvings in range(SNAPSHOTS)}))
    return [
        RunSpec(f"trunk-{seed}", runs.optimizers[0], seed, steps, is_trunk=True, snapshots=snapshots, ends_early=True)
        for seed in runs.seeds
        if steps
    ]


def round_ends(runs: Runs) -> list[int]:
    """Return the step at which each round ends."""
    return [runs.own_steps * number // runs.rounds for number in range(1, runs.rounds + 1)]


OFF: Mapping[str, object] = {"average": None, "early_stop": False, "cooldown": 0.0, "trunk": 0.0, "rounds": 1, "outer": None}
"""Options left out of the hash while they are off, so that runs trained before an option existed stay valid."""


def run_inputs(recipe: Recipe, spec: RunSpec, base_hash: str) -> str:
    """Return the hash of everything that decides a run's result. A finished run with the same hash is not trained again."""
    runs, is_run = recipe.runs, spec.role == "run"
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
    # Controls and trunks use their whole budget in one round.
    unused = set() if is_run else {"trunk", "rounds", "outer", "early_stop"}
    unused |= set() if spec.is_averaged else {"average", "cooldown"}
    for name, off in OFF.items():
        if name in unused or getattr(runs, name) == off:
            del shared[name]
    others: list[object] = []  # what a run shares with the others of its seed
    if {"rounds", "trunk"} & shared.keys():
        others += [runs.optimizers, [runs.lr_of(name) for name in runs.optimizers]]
    others += [runs.trunk_steps] if "trunk" in shared else []
    of_a_control: list[object] = [] if is_run else [spec.rate, recipe.rival.weight_decay, spec.member, spec.snapshots]
    of_a_control += [spec.batch_factor] if spec.batch_factor != 1 else []
    of_a_control += ["trunk"] if spec.is_trunk else ["ends early"] if spec.ends_early else []
    return digest([base_hash, recipe.adapter, shared, spec.optimizer, spec.seed, spec.steps, *others, *of_a_control])
