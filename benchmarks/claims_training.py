"""What the claims about training share: the optimizers and their rivals behind one call, FashionMNIST, and small models.

A *rule* is named `sens/v3.8` (an optimizer and a preset), or `adamw`, `lion`, `prodigy` or `schedule-free`, which need a rate
unless their authors give one. The published presets train as published: no schedule, no clipping. `auto` has the clipping and
the cool-down that emomerge gives it. The rivals have cosine decay and clipping at norm 1, as their users do; schedule-free
AdamW has a warm-up over 5 % of the steps instead.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort
from torch import Tensor, nn

from emomerge import recipe
from emomerge.errors import NonFiniteLossError
from emomerge.optim import OPTIMIZERS
from emomerge.optim.base import EmoOptimizer
from emomerge.tasks.image_classification import ImageClassification, ImageClassificationTask

FIVE = tuple(OPTIMIZERS)
"""The five optimizers."""
PUBLISHED, OURS = "v3.8", "auto"
RATES = {
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lion": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "prodigy": (1.0,),
    "schedule-free": (2.5e-3,),
}
"""Rival → the rates from which its best is chosen on validation data; one where its authors say that it need not be tuned."""
NAMES = {"adamw": "AdamW", "lion": "Lion", "prodigy": "Prodigy", "schedule-free": "schedule-free AdamW"}
COOLDOWN = 0.5
"""The share of the steps over which `auto` cools down, as in recipes."""


class Diverged(Exception):
    """The loss is not finite."""


def emo_arms(*presets: str, names: Sequence[str] = FIVE) -> list[Arm]:
    """Return an arm for each optimizer with each preset."""
    return [{"rule": f"{name}/{preset}"} for preset in presets or (PUBLISHED, OURS) for name in names]


def rival_arms(*names: str) -> list[Arm]:
    """Return an arm for each rate of rivals, by default of all four."""
    return [{"rule": name, "rate": rate} for name in names or RATES for rate in RATES[name]]


def rule_title(rule: str) -> str:
    """Return a rule's name in tables."""
    name, _, preset = rule.partition("/")
    return f"{OPTIMIZERS[name].class_name}, `{preset}`" if preset else NAMES[name]


class Trainer:
    """An optimizer with its schedule and clipping.

    Args:
        rule: see above.
        parameters: what is trained.
        steps: the number of steps, for schedules.
        rate: the peak rate of a rival, or the `lr` of one of the five.
        options: further arguments of the optimizer.
    """

    def __init__(
        self, rule: str, parameters: Iterable[nn.Parameter], steps: int, rate: float | None = None, **options: Any
    ) -> None:
        self.parameters, self.steps, self.taken = list(parameters), steps, 0
        name, _, self.preset = rule.partition("/")
        self.is_emo = name in OPTIMIZERS
        if self.is_emo:
            self.optimizer: Any = OPTIMIZERS[name].load()(
                self.parameters, lr=1.0 if rate is None else rate, preset=self.preset, **options
            )
        else:
            self.optimizer = rival(name, self.parameters, steps, RATES[name][0] if rate is None else rate, **options)
        self.clip = 1.0 if not self.is_emo or self.preset == OURS else None
        self.cosine = not self.is_emo and name != "schedule-free"
        self.peak = self.optimizer.param_groups[0]["lr"]

    @property
    def rate(self) -> float:
        """The rate of the last step."""
        if self.is_emo:
            return float(self.optimizer.pulse.rate * self.optimizer.damping)
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, loss: Tensor) -> float:
        """Differentiate a loss, take a step, and return the loss.

        Raises:
            Diverged: the loss is not finite.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged
        self.optimizer.zero_grad()
        loss.backward()
        self.update(loss)
        return value

    def update(self, loss: Tensor) -> None:
        """Take a step with the gradients as they are."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if isinstance(self.optimizer, EmoOptimizer):
            self.optimizer.observe(loss)
            if self.preset == OURS:
                self.optimizer.damping = min(1.0, (self.steps - self.taken) / (COOLDOWN * self.steps))
        elif self.cosine:
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak * (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        try:
            self.optimizer.step()
        except NonFiniteLossError:
            raise Diverged from None
        self.taken += 1

    def finish(self) -> None:
        """Leave the weights as they are to be used: schedule-free optimizers average theirs."""
        if not self.is_emo and hasattr(self.optimizer, "eval"):
            self.optimizer.eval()


def rival(name: str, parameters: list[nn.Parameter], steps: int, rate: float, **options: Any) -> Any:
    """Return another package's optimizer."""
    options = {"weight_decay": 0.01, **options}
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, fused=True, **options)
    if name == "lion":
        from pytorch_optimizer import Lion

        return Lion(parameters, lr=rate, **options)
    if name == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            return Prodigy(parameters, lr=rate, **options)
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(parameters, lr=rate, warmup_steps=steps // 20, **options)
    made.train()
    return made


# Data and models.


@dataclass(frozen=True)
class Rows:
    """Images, (rows, 784) with pixels in [−1, 1], and their classes, (rows,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def of(self, index: Tensor | slice) -> Rows:
        """Return some rows."""
        return Rows(self.x[index], self.y[index])


@dataclass(frozen=True)
class Images:
    """FashionMNIST: 55,000 rows to train, 5,000 to choose by, and the 10,000 test images."""

    train: Rows
    validation: Rows
    test: Rows


def fashion(effort: Effort) -> Images:
    """Return FashionMNIST, read once in a process."""
    return _read(effort.fashion)


@lru_cache(maxsize=1)
def _read(folder: Path) -> Images:
    test = next(folder.glob("t10k-images-idx3-ubyte*"), folder / "t10k-images-idx3-ubyte.gz")
    section = ImageClassification(
        kind="image-classification", train=str(folder), validation=str(test), test=str(test)
    )  # nothing is held out of the training images
    data = ImageClassificationTask(section).load_data(recipe.Base(prepare=recipe.Prepare(model="mlp")))
    batches = (split.batch(range(len(split))) for split in (data.train, data.test))
    train, held_out = (Rows(batch["pixel_values"].flatten(1), batch["labels"]) for batch in batches)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Images(train.of(order[5000:]), train.of(order[:5000]), held_out)


def mlp(inputs: int = 784, hidden: int = 128, outputs: int = 10) -> nn.Sequential:
    """Return an MLP with one hidden layer and ReLU."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def batches(rows: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the row numbers of each step's batch: epochs in random order, the rest of each dropped."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(rows, generator=generator)
        batch, order = order[:size], order[size:]
        yield batch


def train_classifier(
    model: nn.Module,
    trainer: Trainer,
    rows: Rows,
    *,
    size: int = 64,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train for the trainer's steps. Return the loss of every step.

    Raises:
        Diverged: the loss is not finite.
    """
    losses = []
    for step, batch in enumerate(batches(len(rows), size, trainer.steps, seed)):
        losses.append(trainer.step(F.cross_entropy(model(rows.x[batch]), rows.y[batch])))
        on_step(step, losses[-1])
    trainer.finish()
    return losses


@torch.no_grad()
def loss_of(model: nn.Module, rows: Rows) -> float | None:
    """Return the mean cross-entropy; None if it is not finite."""
    value = float(F.cross_entropy(model(rows.x), rows.y))
    return value if math.isfinite(value) else None


@torch.no_grad()
def accuracy_of(model: nn.Module, rows: Rows) -> float:
    """Return the share of rows whose class is the most probable one."""
    return float((model(rows.x).argmax(1) == rows.y).double().mean())
