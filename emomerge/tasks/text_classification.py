"""Sentences into classes: TSV, CSV, JSONL or a `datasets` id, a tokenizer, and a sequence classifier."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.recipe import TextColumns
from emomerge.tasks import sources
from emomerge.tasks.base import Batch, Split, Task, TaskData
from emomerge.tasks.pretrained import input_length, load_classifier, load_config, load_tokenizer, reload_complete
from emomerge.tasks.tables import Row, read_rows


class TextSplit(Split):
    """Token ids and their like, each (rows, longest), padded on the right; a batch is as wide as its longest row."""

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        super().__init__({name: field.int() for name, field in fields.items()})

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Token fields (len(indices), longest of these) and labels (len(indices),), all int64."""
        fields = super().batch(indices)
        width = int(fields["attention_mask"].sum(dim=1).max()) if len(fields["labels"]) else 0
        return {name: (field if field.ndim == 1 else field[:, :width]).long() for name, field in fields.items()}


class TextClassificationTask(Task):
    """Cross-entropy of a transformers sequence classifier.

    Args:
        section: the recipe's `task`.
    """

    kind = "text-classification"
    peft_task_type = "SEQ_CLS"

    def __init__(self, section: recipe.TextClassification) -> None:
        self.section = section
        self._tokenizer: Any = None

    def load_data(self, base: recipe.Base) -> TaskData:
        """Read, label, split and tokenise all sentences; see `Task.load_data`."""
        section = self.section
        given = {"train": section.train, "validation": section.validation, "test": section.test}
        rows = {role: _read(source, role, section.columns) for role, source in given.items() if source is not None}
        labelling = _labelling(section, rows["train"])
        labelled = {role: _label(part, labelling, given[role]) for role, part in rows.items()}
        left_out = sum(len(rows[role]) - len(part) for role, part in labelled.items())

        train = labelled.pop("train")
        picks = sources.split_rows(len(train), section, validation=section.validation is None, test=section.test is None)
        parts = dict(zip(given, map(train.take, picks), strict=True)) | labelled
        sources.check_classes(parts["train"].labels, labelling.classes, section.train)

        self._tokenizer = load_tokenizer(base)
        config = load_config(base).get_text_config()
        longest, vocabulary = input_length(section, self._tokenizer, config), getattr(config, "vocab_size", math.inf)
        splits = {role: _tokenise(part, self._tokenizer, longest, vocabulary) for role, part in parts.items()}
        summary = sources.summarise(list(splits.values()), labelling.classes, left_out)
        return TaskData(**splits, classes=labelling.classes, summary=summary)

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """A sequence classifier on the base; see `Task.new_model`."""
        from transformers import AutoModelForSequenceClassification

        model: Any = load_classifier(AutoModelForSequenceClassification, base, data.classes)
        # Decoders classify at the last token that is no padding, so the model must know what we pad with.
        model.config.get_text_config().pad_token_id = load_tokenizer(base).pad_token_id
        classifier: nn.Module = model
        return classifier

    def save_processor(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        if self._tokenizer is None:
            raise RuntimeError("load_data comes before save_processor")
        self._tokenizer.save_pretrained(str(folder))

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """A saved sequence classifier; see `Task.reload_model`."""
        from transformers import AutoModelForSequenceClassification

        return reload_complete(AutoModelForSequenceClassification, folder, trust_remote_code)


# Tokens


def _tokenise(sentences: _Sentences, tokenizer: Any, longest: int, vocabulary: float) -> TextSplit:
    # Padded on the right for every model: positions counted from the left are then those of the sentence alone.
    tokens = tokenizer(
        sentences.texts,
        truncation=True,
        max_length=longest,
        padding="longest",
        padding_side="right",
        return_attention_mask=True,
        return_tensors="pt",
    )
    lengths = tokens["attention_mask"].sum(dim=1)
    if not lengths.all():
        raise BadInput("the tokenizer finds no token in a text", found=repr(sentences.texts[int(lengths.argmin())]))
    largest = int(tokens["input_ids"].max())
    if largest >= vocabulary:
        raise BadInput("the tokenizer gives tokens the base has not", expected=f"ids below {vocabulary}", found=largest)
    return TextSplit({**tokens, "labels": sentences.labels})


# Labels


@dataclass(frozen=True)
class _Labelling:
    """How labels become class numbers; None leaves the row out."""

    classes: tuple[str, ...]
    find: Callable[[Any, str], int | None]
    """(label, where) → number of its class."""


@dataclass(frozen=True)
class _Sentences:
    """Texts and their class numbers (rows,)."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Tensor) -> _Sentences:
        """These rows only."""
        return _Sentences([self.texts[row] for row in rows.tolist()], self.labels[rows])


def _labelling(section: recipe.TextClassification, train: Sequence[Row]) -> _Labelling:
    if isinstance(section.classes, dict):
        return _Labelling(tuple(section.classes), _by_rating(section.classes))
    names = section.classes or sources.distinct_classes(sources.label_text(row.cells[1]) for row in train)
    if len(set(names)) < len(names):
        raise BadInput("a class is named twice", where="task.classes", found=", ".join(names))
    number = sources.class_index(names)
    return _Labelling(names, lambda label, where: number(sources.label_text(label), where))


def _label(rows: Sequence[Row], labelling: _Labelling, source: object) -> _Sentences:
    """The rows that have a class. Raises BadInput for a row of them that has no text."""
    texts, labels = [], []
    for row in rows:
        where, (text, own_label) = f"{source}, row {row.number}", row.cells
        label = labelling.find(own_label, where)
        if label is None:
            continue
        if not isinstance(text, str) or not text.strip():
            raise BadInput("row without text", where=where, found=repr(text))
        texts.append(text)
        labels.append(label)
    if not texts:
        raise BadInput("no usable rows", where=source)
    return _Sentences(texts, torch.tensor(labels))


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_COMPARISON = re.compile(rf"\s*(<=|>=|==|<|>)\s*({_NUMBER})\s*")
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


def _by_rating(conditions: Mapping[str, str]) -> Callable[[Any, str], int | None]:
    """A function (rating, where) → number of the one class whose condition the rating meets, None if it meets none."""
    tests = [_condition(name, text) for name, text in conditions.items()]
    names = list(conditions)

    def find(rating: Any, where: str) -> int | None:
        text = sources.label_text(rating)
        if not re.fullmatch(_NUMBER, text):
            raise BadInput("rating is no number", where=where, found=repr(rating))
        met = [index for index, test in enumerate(tests) if test(float(text))]
        if len(met) > 1:
            raise BadInput(
                "a rating meets two conditions", where=where, found=f"{text} in {names[met[0]]!r} and {names[met[1]]!r}"
            )
        return met[0] if met else None

    return find


def _condition(name: str, text: str) -> Callable[[float], bool]:
    """`>= 1, < 3` as a function of a rating."""
    comparisons = [_COMPARISON.fullmatch(part) for part in text.split(",")]
    if not all(comparisons):
        raise BadInput(
            "condition not understood",
            where=f"task.classes.{name}",
            expected="comparisons with numbers such as '< -0.5' or '>= 1, < 3'",
            found=repr(text),
        )
    bounds = [(_OPERATORS[match[1]], float(match[2])) for match in comparisons if match]
    return lambda rating: all(compare(rating, bound) for compare, bound in bounds)


def _read(source: str, role: str, columns: TextColumns) -> list[Row]:
    """All rows of a file or of the split `role` of a data set, as (text, label); every one has a label."""
    rows = read_rows(source, role, (columns.text, columns.label))
    for row in rows:
        if row.cells[1] is None or row.cells[1] == "":
            raise BadInput("row without a label", where=f"{source}, row {row.number}")
    return rows
