"""The base class of tasks, and the types they exchange with training, probing and the report."""

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
from emomerge.adapters import open_dense
from emomerge.checkpoints import load_into, open_checkpoint, working_dtype
from emomerge.numerics.seeds import cpu_seed

Batch = dict[str, Tensor]


class Split:
    """An immutable set of examples on the CPU, addressed by row number.

    Args:
        fields: name -> tensor (rows, ...): the inputs of the model's forward and, usually as `labels`, its targets.
    """

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        self._fields = dict(fields)

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the examples of these rows, in this order, as new tensors (len(indices), ...)."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return {name: field[rows] for name, field in self._fields.items()}

    def take(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a split of these rows only."""
        return type(self)(self.batch(indices))

    def digest_of(self, name: str) -> str | None:
        """Return the SHA-256 of one field of all examples in order; None if they lack it."""
        return Split({name: self._fields[name]}).digest if name in self._fields else None

    @cached_property
    def lengths(self) -> Tensor:
        """What each row takes of a batch that is padded to its longest row, (rows,); all 0 if batches are not padded."""
        return torch.zeros(len(self), dtype=torch.int64)

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
        train: the rows that runs are trained on.
        validation: the rows that choices are made on.
        test: the rows that reported results are measured on.
        classes: the names of labels 0, 1, ...; empty if there are none.
        summary: one line for the report, such as "10,043 rows in 2 classes; 561 left out".
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    summary: str


class RowFigures(NamedTuple):
    """Measures of each row of a batch, all (rows,)."""

    loss: Tensor
    """Mean over the row's targets; in nats if it is a cross-entropy."""
    weight: Tensor
    """Number of the row's targets: 1 for a label, or its tokens."""
    accuracy: Tensor | None = None
    entropy: Tensor | None = None
    """Mean entropy of the predictions, in nats."""


class Texts(NamedTuple):
    """Texts that a model generated from prompts."""

    prompts: list[str]
    texts: list[str]
    about: str
    """How they were sampled, in one sentence."""


class Images(NamedTuple):
    """Images that a model generated, as one picture."""

    picture: Tensor
    """uint8 (height, width, 1 or 3)."""
    about: str
    """How they were sampled, in one sentence."""


Samples = Texts | Images


class Task(ABC):
    """Base class of tasks: examples in three splits, a model that learns them, and a loss.

    A subclass sets `section_class` and implements `load_data`. If its model is a plain torch module, it also implements
    `build`; models of transformers derive from `TransformersTask` instead. The default loss is the cross-entropy of the
    scores that the model returns for the batch's other fields with the batch's `labels`. Equal recipes must give
    bit-identical data and models.

    Args:
        section: the recipe's `task`.
    """

    section_class: ClassVar[type[recipe.TaskSection]]
    """The section of the recipe that configures the task."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's name for the task, if it has one; it decides how PEFT treats heads."""
    perplexity: ClassVar[bool] = False
    """Whether the exponential of the loss is a perplexity, which the report then shows."""
    is_mean_of_padded_rows: ClassVar[bool] = False
    """Whether the loss is the plain mean over rows that are padded on the right, with the padding in `attention_mask`: the rows
    of a batch may then be passed in parts that are padded less."""
    unit: str = "nats"
    """The unit of losses in reports."""

    def __init__(self, section: Any) -> None:
        self.section = section

    @abstractmethod
    def load_data(self, base: recipe.Base) -> TaskData:
        """Read all examples and convert them to the inputs that the base takes.

        Raises:
            BadInput: the data or the base's processor is missing or unusable; the message names file, row and column.
        """

    def build(self) -> nn.Module:
        """Return the task's network with weights drawn from torch's default generator.

        Its sizes depend on the section alone, so that saved weights always fit.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither `build` nor `new_model` and `reload_model`")

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return the base in float32 and eval mode.

        The default builds the network under `base.seed` and loads the weights of `base.model` if it is given.

        Args:
            base: the recipe's `base`.
            data: from `load_data`; a classifier's head is named after `data.classes`.

        Raises:
            BadInput: the base is missing or is not a model for this task.
        """
        with cpu_seed(base.seed):
            model = self.build()
        if base.model is not None:
            load_into(model, open_dense(base.model))
        return model.eval()

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """Return a saved model of this task in float32 and eval mode.

        Raises:
            BadInput: a tensor is missing or has another shape.
        """
        with cpu_seed(0):
            model = self.build()
        load_into(model, open_checkpoint(folder))
        return model.eval()

    def save_files(self, model: nn.Module, folder: str | Path) -> None:  # noqa: B027 - most plain modules have none
        """Write the files of a model folder other than its weights; by default there are none. Call after `load_data`."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores (rows, classes) of a batch on the model's device."""
        scores: Tensor = model(**inputs_of(batch))
        return scores

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the batch's labels in nats: a scalar, float32 even under autocast."""
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.to(working_dtype(logits.dtype)), batch["labels"])

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Return loss, weight, accuracy and entropy of each row of a batch; `loss` is the weighted mean of the first."""
        logits, labels = self.logits(model, batch), batch["labels"]
        logits = logits.to(working_dtype(logits.dtype))
        loss = F.cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(dim=-1) == labels).to(loss.dtype)
        return RowFigures(loss, torch.ones_like(loss), correct, predictive_entropy(logits))

    def samples(self, model: nn.Module) -> Samples | None:
        """Return texts or images that the model generates, for the report; None if the task generates nothing.

        Call after `load_data`.
        """
        return None


def inputs_of(batch: Batch) -> Batch:
    """Return the fields of a batch without `labels`."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def predictive_entropy(logits: Tensor) -> Tensor:
    """Return −Σ p log p in nats: (..., classes) -> (...)."""
    entropy: Tensor = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    return entropy
