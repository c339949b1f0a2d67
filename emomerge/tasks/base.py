"""What a task is: examples in three splits, a model that learns them, and a loss."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emomerge import recipe
from emomerge.checkpoints import working_dtype

Batch = dict[str, Tensor]


class Split:
    """An immutable set of examples on the CPU, addressed by row number.

    Args:
        fields: name → tensor (rows, …): what the model's forward takes and what its output is compared with, mostly `labels`.
    """

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        self._fields = dict(fields)

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The examples of these rows, in this order, as new tensors (len(indices), …)."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return {name: field[rows] for name, field in self._fields.items()}

    def take(self, indices: Sequence[int] | Tensor) -> Self:
        """A split of these rows only."""
        return type(self)(self.batch(indices))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all examples in order: names, dtypes, shapes and bytes of their tensors."""
        sha = hashlib.sha256()
        for rows in torch.split(torch.arange(len(self)), 4096):
            for name, tensor in sorted(self.batch(rows).items()):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class TaskData:
    """All examples of a task.

    Attributes:
        train: what runs learn from.
        validation: what choices are made on.
        test: what reported figures come from.
        classes: the names of labels 0, 1, …; empty where there are none.
        summary: one line for people, such as "10,043 rows in 2 classes; 561 left out".
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    summary: str


class RowFigures(NamedTuple):
    """Figures of each row of a batch, all (rows,)."""

    loss: Tensor
    """Mean over what the row has to predict; in nats where it is a cross-entropy."""
    weight: Tensor
    """How much that is: 1 label, or so many tokens."""
    accuracy: Tensor | None = None
    entropy: Tensor | None = None
    """Mean entropy of the predictions, in nats."""


class Texts(NamedTuple):
    """What a model writes after some prompts."""

    prompts: list[str]
    texts: list[str]
    about: str
    """How they were drawn, in a sentence."""


class Images(NamedTuple):
    """Images a model made, as one picture."""

    picture: Tensor
    """uint8 (height, width, 1 or 3)."""
    about: str


Samples = Texts | Images


class Task(ABC):
    """One kind of learning. A subclass is constructed from its section of the recipe and says where examples and models
    come from; equal recipes give bit-identical data and models."""

    kind: ClassVar[str]
    """The recipe's `task.kind`."""

    peft_task_type: ClassVar[str | None] = None
    """PEFT's name for such tasks, if it has one."""

    unit: str = "nats"
    """What losses are counted in, for reports."""

    @abstractmethod
    def load_data(self, base: recipe.Base) -> TaskData:
        """Read all examples and bring them into the form that the base takes.

        Raises:
            BadInput: the data or the base's processor is missing or unusable; names file, row and column.
        """

    @abstractmethod
    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """The base in fp32 and eval mode, its head named after `data.classes`; a head that the checkpoint lacks, or has
        for another number of classes, is drawn with `base.seed`.

        Raises:
            BadInput: the base is missing or no model of this task.
        """

    @abstractmethod
    def save_processor(self, folder: str | Path) -> None:
        """Write what turns raw input into model input (tokenizer, image sizes) beside a model; after `load_data`."""

    def save_files(self, model: nn.Module, folder: str | Path) -> None:
        """Write what a model folder has beside its weights: configuration and processor; after `load_data`."""
        saved: Any = model
        saved.config.architectures = [type(model).__name__]
        saved.config.save_pretrained(str(folder))
        if saved.can_generate():
            saved.generation_config.save_pretrained(str(folder))
        self.save_processor(folder)

    @abstractmethod
    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """A saved model of this task in fp32 and eval mode. Raises BadInput where a tensor is missing or misshapen."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores (rows, classes) of a batch on the model's device."""
        scores: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return scores

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch's labels in nats: a scalar, fp32 also under autocast."""
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.to(working_dtype(logits.dtype)), batch["labels"])

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Figures of each row of a batch; `loss` is their weighted mean."""
        logits, labels = self.logits(model, batch), batch["labels"]
        logits = logits.to(working_dtype(logits.dtype))
        loss = F.cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(dim=-1) == labels).to(loss.dtype)
        return RowFigures(loss, torch.ones_like(loss), correct, predictive_entropy(logits))

    def samples(self, model: nn.Module) -> Samples | None:
        """What the model makes, for people to look at; after `load_data`. None for a task that makes nothing."""
        return None


def predictive_entropy(logits: Tensor) -> Tensor:
    """−Σ p log p in nats: (…, classes) → (…)."""
    entropy: Tensor = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    return entropy
