"""What the text tasks share: splits of token ids, and the bounds that a base sets on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from emomerge.errors import BadInput
from emomerge.recipe import DataSection
from emomerge.tasks.base import Batch, Split
from emomerge.tasks.pretrained import TransformersTask


class TextSplit(Split):
    """Token ids and attention mask, each (rows, longest), padded on the right; a batch is as wide as its longest row."""

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        super().__init__({name: field.int() for name, field in fields.items()})

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens in each row (rows,)."""
        return self._fields["attention_mask"].sum(dim=1)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return token fields (len(indices), longest of these) and labels (len(indices),), all int64."""
        fields = super().batch(indices)
        width = int(fields["attention_mask"].sum(dim=1).max()) if len(fields["labels"]) else 0
        return {name: (field if field.ndim == 1 else field[:, :width]).long() for name, field in fields.items()}


class TextTask(TransformersTask):
    """Base class of tasks on tokenized text."""

    def __init__(self, section: DataSection) -> None:
        super().__init__(section)
        self._tokenizer: Any = None

    def save_processor(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        if self._tokenizer is None:
            raise RuntimeError("call load_data before save_processor")
        self._tokenizer.save_pretrained(str(folder))

    def _max_length(self, config: Any) -> int:
        """Return how many tokens a row may have: `max_length`, by default at most the positions that the base has.

        Args:
            config: of the base; None if the base is still to be built.
        """
        wanted: int = self.section.max_length
        positions: int = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or wanted)
        if wanted > positions and "max_length" in self.section.model_fields_set:
            raise BadInput(
                "texts may be longer than the base can read",
                where="task.max_length",
                expected=f"at most {positions}",
                found=wanted,
            )
        return min(wanted, positions)


def check_vocabulary(largest: int, config: Any) -> None:
    """Check that the base has an embedding for the largest token id."""
    size = getattr(config, "vocab_size", None)
    if size is not None and largest >= size:
        raise BadInput("the tokenizer has tokens that the base lacks", expected=f"ids below {size}", found=largest)
