"""What the claims about merging share: tasks with a base, runs over it that stay apart or meet in rounds, and their merges.

A *member* is one run: a rule (see `claims_training`), the number of its data order, and a rate for AdamW. Members with the same
order see the same batches. Runs apart start from the base and meet only in the merge. Runs in rounds follow emomerge's default
procedure with its own settings: a trunk of half of all steps, the branch where the validation loss is lowest, rounds with outer
momentum, and a greedy soup of the rounds' means. Merges are made by `emomerge.merge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort
from claims_training import Diverged, Images, Rows, Trainer, batches, fashion, train_classifier
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import emomerge
from emomerge.checkpoints import Checkpoint, MemoryCheckpoint
from emomerge.recipe import Runs
from emomerge.training.plan import round_ends
from emomerge.training.rounds import nesterov

State = dict[str, Tensor]
STEPS, SHALLOW = 200, 100
"""Steps of one run of five: about which members to merge, and in the other claims."""


class Member(NamedTuple):
    """One run."""

    rule: str
    order: int = 0
    rate: float | None = None


@dataclass(frozen=True)
class Setting:
    """A task.

    Attributes:
        title: its name in tables.
        data: where the images are from.
        shift: what the runs adapt to; `invert` turns the pixels' sign, `rotate` the image by 180°.
        layers: width of each layer of the MLP, the input first; none for a CNN of two convolutions.
        base_steps: steps of the base on the images as they are.
        batch: rows of a batch.
        rows: number of rows to train on; all by default.
        rank: rank of LoRA on every layer; None trains all weights.
    """

    title: str
    data: Literal["fashion", "digits"]
    shift: Literal["none", "invert", "rotate"]
    layers: tuple[int, ...]
    base_steps: int
    batch: int
    rows: int | None = None
    rank: int | None = None


SMALL = (196, 64, 64, 10)
SETTINGS = {
    "mild": Setting("FashionMNIST, mild", "fashion", "none", SMALL, 300, 64),
    "strong": Setting("FashionMNIST, strong", "fashion", "invert", SMALL, 1500, 64),
    "small": Setting("FashionMNIST, strong, 500 rows", "fashion", "invert", SMALL, 1500, 32, rows=500),
    "cnn": Setting("FashionMNIST, CNN", "fashion", "invert", (), 300, 32, rows=10_000),
    "digits": Setting("digits, LoRA", "digits", "rotate", (64, 64, 64, 10), 450, 32, rank=8),
}
ABOUT = (
    "Tasks: an MLP with two hidden layers of 64; on FashionMNIST at 14 × 14 pixels, “mild” continues the training of a base of "
    "300 steps, and “strong” adapts a base of 1,500 steps to inverted images; “digits” adapts to upside-down digits with LoRA "
    "of rank 8 on every layer."
)


@lru_cache(maxsize=1)
def _halved(effort: Effort) -> Images:
    """Return FashionMNIST with 14 × 14 pixels, each the mean of four."""
    full = fashion(effort)

    def half(rows: Rows) -> Rows:
        return Rows(F.avg_pool2d(rows.x.view(-1, 1, 28, 28), 2).flatten(1), rows.y)

    return Images(half(full.train), half(full.validation), half(full.test))


def _digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rows = Rows(x, y)
    return Images(rows.of(order[997:]), rows.of(order[:400]), rows.of(order[400:997]))


class _LowRank(nn.Module):
    """W₀ + 2·BA; A is drawn with a seed, B is zero."""

    def __init__(self, outputs: int, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.up @ self.down


class Task:
    """Data, base and losses of a setting."""

    def __init__(self, setting: Setting, effort: Effort) -> None:
        self.setting = setting
        images = _halved(effort) if setting.data == "fashion" else _digits()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.plain = self._network()
            trainer = Trainer("adamw", self.plain.parameters(), effort.steps(setting.base_steps), 1e-3)
            train_classifier(self.plain, trainer, images.train, seed=1000)
        self.base: State = {name: tensor.detach().clone() for name, tensor in self.plain.state_dict().items()}
        train = images.train.of(slice(setting.rows))
        self.train, self.validation, self.test = (self._shifted(rows) for rows in (train, images.validation, images.test))

    def _network(self) -> nn.Sequential:
        if not self.setting.layers:
            return nn.Sequential(
                nn.Unflatten(1, (1, 14, 14)), nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
                nn.Flatten(), nn.Linear(256, 10),
            )  # fmt: skip
        widths = self.setting.layers
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    def _shifted(self, rows: Rows) -> Rows:
        shift = self.setting.shift
        return Rows(-rows.x if shift == "invert" else rows.x.flip(1) if shift == "rotate" else rows.x, rows.y)

    def network(self, seed: int) -> nn.Sequential:
        """Return the base to be trained, with LoRA where the setting has it, drawn with the seed."""
        made = self._network()
        made.load_state_dict(self.base)
        if self.setting.rank is not None:
            made.requires_grad_(False)
            generator = torch.Generator().manual_seed(seed)
            for layer in made:
                if isinstance(layer, nn.Linear):
                    low_rank = _LowRank(layer.out_features, layer.in_features, self.setting.rank, generator)
                    parametrize.register_parametrization(layer, "weight", low_rank)
        return made

    @torch.no_grad()
    def loss(self, state: State, rows: Rows) -> float:
        """Return the mean cross-entropy of weights; infinite if it is not finite."""
        value = float(F.cross_entropy(functional_call(self.plain, state, (rows.x,)), rows.y))
        return value if math.isfinite(value) else math.inf

    def held_out(self, state: State | Checkpoint) -> float:
        """Return the validation loss, by which everything is chosen."""
        return self.loss({name: state[name] for name in self.base}, self.validation)

    def losses(self, state: State) -> list[float | None]:
        """Return validation and test loss; None for what is not finite."""
        return [value if math.isfinite(value) else None for value in (self.held_out(state), self.loss(state, self.test))]

    def merge(self, states: Sequence[State], method: str, *, tuned: bool = False, **options: Any) -> State:
        """Return a merge.

        Args:
            states: the runs' weights.
            method: a merge method of emomerge.
            tuned: let the method choose weights and scale on validation data, as the product does.
            options: settings of the method.
        """
        tuned = tuned or options.get("scale") == "auto" or method == "greedy-soup"
        merged = emomerge.merge(
            MemoryCheckpoint(self.base), [MemoryCheckpoint(state) for state in states], method=method,
            held_out_loss=self.held_out if tuned else None, **options,
        )  # fmt: skip
        return {name: merged[name] for name in self.base}

    def best(self, states: Sequence[State]) -> State:
        """Return the weights with the lowest validation loss."""
        return min(states, key=self.held_out)

    def sharpness(self, state: State, radii: Sequence[float] = (0.1,), directions: int = 16) -> dict[str, float | None]:
        """Return Gaussian sharpness (see `emomerge.probe`) on up to 2,000 training rows, by radius; None if it diverges.

        Radii are fractions of the base's RMS per tensor. The directions are the same for all weights.
        """
        probed, base = self._network(), self._network()
        probed.load_state_dict(state)
        base.load_state_dict(self.base)
        rows = self.train.of(slice(2000))

        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
            return F.cross_entropy(model(batch["x"]), batch["y"]), float(len(batch["y"]))

        found = emomerge.probe(
            probed, loss, [{"x": rows.x, "y": rows.y}], {"gaussian": {"radii": radii, "directions": directions}}, reference=base
        )["gaussian"]
        return {f"{radius:g}": found[f"{radius:g}"]["mean"] for radius in radii}

    def distance(self, state: State) -> float:
        """Return the length of a task vector."""
        return math.sqrt(sum(float((state[name] - tensor).double().square().sum()) for name, tensor in self.base.items()))

    def scaled(self, state: State, length: float) -> State:
        """Return weights whose task vector has another length."""
        return self.merge([state], "task-arithmetic", scale=length / self.distance(state))


@lru_cache(maxsize=8)
def task(name: str, effort: Effort) -> Task:
    """Return a task, made once in a process."""
    return Task(SETTINGS[name], effort)


class Run:
    """A run that can be stopped and continued.

    Args:
        of: the task.
        member: what trains.
        seed: the training seed; with the member's order it decides the batches.
        steps: the steps of the schedule.
        rows: what it sees; by default all training rows.
        factor: size of a batch as a multiple of the task's.
    """

    def __init__(self, of: Task, member: Member, seed: int, steps: int, *, rows: Rows | None = None, factor: int = 1) -> None:
        self.rows = of.train if rows is None else rows
        self.network = of.network(seed)
        self.weights = [p for p in self.network.parameters() if p.requires_grad]
        self.trainer = Trainer(member.rule, self.weights, steps, member.rate)
        self._batches = batches(len(self.rows), of.setting.batch * factor, steps, 100 * seed + member.order)

    def advance(self, steps: int, *, finish: bool = True) -> None:
        """Take steps.

        Raises:
            Diverged: the loss is not finite.
        """
        for _ in range(steps):
            batch = next(self._batches)
            self.trainer.step(F.cross_entropy(self.network(self.rows.x[batch]), self.rows.y[batch]))
        if finish:
            self.trainer.finish()

    @property
    def state(self) -> State:
        """The weights, LoRA added to the base."""
        layers = {n: layer for n, layer in self.network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        return {
            f"{name}.{part}": getattr(layer, part).detach().clone()
            for name, layer in layers.items()
            for part in ("weight", "bias")
        }

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace the trained weights; the optimizer keeps its state."""
        for own, new in zip(self.weights, weights, strict=True):
            own.copy_(new)


def train_apart(of: Task, members: Sequence[Member], seed: int, steps: int) -> list[State]:
    """Train separate runs from the base.

    Raises:
        Diverged: a loss is not finite.
    """
    states = []
    for member in members:
        run = Run(of, member, seed, steps)
        run.advance(steps)
        states.append(run.state)
    return states


class Met(NamedTuple):
    """Runs that met in rounds."""

    finished: list[State]
    kept: list[State]
    """The trunk where the runs branched off, and the means at the end of the rounds that are kept."""


def train_rounds(of: Task, members: Sequence[Member], seed: int, steps: int) -> Met:
    """Train runs by emomerge's default procedure; `steps` are those of one run, its share of the trunk included.

    Raises:
        Diverged: a loss is not finite.
    """
    plan = Runs(steps=steps)
    trunk_steps = (steps - plan.own_steps) * len(members)
    start, branch = _trunk(of, members[0], seed, trunk_steps)
    runs = [Run(of, member, seed, plan.own_steps) for member in members]
    kept, momentum = [branch], [None] * len(start)
    for run in runs:
        run.set_weights(start)
    before = 0
    for number, end in enumerate(round_ends(plan), 1):
        for run in runs:
            run.advance(end - before, finish=end == plan.own_steps)
        before, mean = end, mean_weights(runs)
        if number in plan.kept_rounds:
            kept.append(_state_of(of, mean, seed))
        if end < plan.own_steps and plan.outer is not None:
            moved = [nesterov(s, m, v, plan.outer) for s, m, v in zip(start, mean, momentum, strict=True)]
            start, momentum = [m for m, _ in moved], [v for _, v in moved]  # type: ignore[misc]
            for run in runs:
                run.set_weights(start)
    return Met([run.state for run in runs], kept)


def mean_weights(runs: Sequence[Run]) -> list[Tensor]:
    """Return the mean of the runs' trained weights, LoRA factor by factor."""
    return [torch.stack([w.detach() for w in weights]).mean(0) for weights in zip(*(run.weights for run in runs), strict=True)]


def _trunk(of: Task, member: Member, seed: int, steps: int) -> tuple[list[Tensor], State]:
    """Return the trunk's trained weights and its whole weights where its validation loss is lowest."""
    run = Run(of, member._replace(order=90), seed, 2 * steps)  # half of a schedule: the trunk does not cool down
    best, taken = (math.inf, [], run.state), 0
    for snapshot in sorted({max(1, steps >> halvings) for halvings in range(8)}):
        run.advance(snapshot - taken, finish=False)
        taken = snapshot
        loss = of.held_out(run.state)
        if loss < best[0] or not best[1]:
            best = (loss, [w.detach().clone() for w in run.weights], run.state)
    return best[1], best[2]


def _state_of(of: Task, weights: Sequence[Tensor], seed: int) -> State:
    holder = Run(of, Member("sens/auto"), seed, 1)
    holder.set_weights(weights)
    return holder.state


def soup_of(of: Task, met: Met) -> State:
    """Return the merge that emomerge makes by default: the greedy soup of the rounds."""
    return of.merge(met.kept, "greedy-soup", scale="auto")


def if_converged(measure: Callable[[], dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return the figures, or None for each of these names if the training diverged."""
    try:
        return measure()
    except Diverged:
        return dict.fromkeys(names)


def by_task(arms: Sequence[Arm], tasks: Sequence[str]) -> list[Arm]:
    """Return every arm for every task."""
    return [{"task": name, **arm} for name in tasks for arm in arms]
