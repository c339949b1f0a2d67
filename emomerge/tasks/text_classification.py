"""Text classification: TSV, CSV, JSONL or a `datasets` id, a tokenizer, and a sequence classifier."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.tasks import sources
from emomerge.tasks.base import Batch, RowFigures, TaskData
from emomerge.tasks.padding import narrow, passes_of
from emomerge.tasks.pretrained import load_classifier, load_config, load_tokenizer
from emomerge.tasks.rows import Row, read_rows
from emomerge.tasks.text import TextSplit, TextTask, check_vocabulary


class TextColumns(recipe.Section):
    """Columns by name (the first row is then a header) or by number from 0 (the file then has no header)."""

    text: str | int = "text"
    label: str | int = "label"


class TextClassification(recipe.DataSection):
    """Section `task` of a recipe that classifies texts."""

    kind: Literal["text-classification"]
    columns: TextColumns = TextColumns()
    classes: tuple[str, ...] | dict[str, str] | None = None
    """The labels in order, or class -> condition on a numeric rating, such as `{bad: "< -0.5", good: "> 0.5"}`; rows that
    meet no condition are left out. By default the distinct labels, sorted."""
    max_length: int = Field(128, ge=4)
    """Tokens per text; longer texts are truncated."""


class TextClassificationTask(TextTask):
    """Cross-entropy of a sequence classifier of transformers."""

    section_class = TextClassification
    section: TextClassification
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    is_mean_of_padded_rows = True

    def load_data(self, base: recipe.Base) -> TaskData:
        """Read, label, split and tokenize all texts; see `Task.load_data`."""
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
        longest = self._max_length(config)
        splits = {role: _tokenize(part, self._tokenizer, longest, config) for role, part in parts.items()}
        summary = sources.summarize(list(splits.values()), labelling.classes, left_out)
        return TaskData(**splits, classes=labelling.classes, summary=summary)

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return a sequence classifier on the base; see `Task.new_model`."""
        model: Any = load_classifier(self.loader, base, data.classes)
        # Decoders classify at the last token that is not padding, so the model must know the padding token.
        model.config.get_text_config().pad_token_id = load_tokenizer(base).pad_token_id
        classifier: nn.Module = model
        return classifier

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Return the figures of each row; on the CPU, rows of similar length share a pass. See `Task.row_figures`."""
        passes = passes_of(model, batch)
        if len(passes) == 1:
            return super().row_figures(model, batch)
        places = torch.cat(passes).argsort()
        found = [super(TextClassificationTask, self).row_figures(model, narrow(batch, rows)) for rows in passes]
        return RowFigures(*(torch.cat(parts)[places] for parts in zip(*found, strict=True)))


# Tokens


def _tokenize(texts: _Texts, tokenizer: Any, longest: int, config: Any) -> TextSplit:
    # Padded on the right for every model, so that positions do not depend on the padding.
    tokens = tokenizer(
        texts.texts,
        truncation=True,
        max_length=longest,
        padding="longest",
        padding_side="right",
        return_attention_mask=True,
        return_tensors="pt",
    )
    lengths = tokens["attention_mask"].sum(dim=1)
    if not lengths.all():
        raise BadInput("the tokenizer finds no token in a text", found=repr(texts.texts[int(lengths.argmin())]))
    check_vocabulary(int(tokens["input_ids"].max()), config)
    return TextSplit({**tokens, "labels": texts.labels})


# Labels


@dataclass(frozen=True)
class _Labelling:
    """The classes and how a row's label maps to one of them."""

    classes: tuple[str, ...]
    find: Callable[[Any, str], int | None]
    """(label, where) -> number of its class; None leaves the row out."""


@dataclass(frozen=True)
class _Texts:
    """Texts and their class numbers (rows,)."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Tensor) -> _Texts:
        """Return these rows only."""
        return _Texts([self.texts[row] for row in rows.tolist()], self.labels[rows])


def _labelling(section: TextClassification, train: Sequence[Row]) -> _Labelling:
    if isinstance(section.classes, dict):
        return _Labelling(tuple(section.classes), _by_rating(section.classes))
    names = section.classes or sources.distinct_classes(sources.label_text(row.cells[1]) for row in train)
    if len(set(names)) < len(names):
        raise BadInput("a class is named twice", where="task.classes", found=", ".join(names))
    number = sources.class_index(names)
    return _Labelling(names, lambda label, where: number(sources.label_text(label), where))


def _label(rows: Sequence[Row], labelling: _Labelling, source: object) -> _Texts:
    """Return the rows that have a class. Raises BadInput if one of these has no text."""
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
    return _Texts(texts, torch.tensor(labels))


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_COMPARISON = re.compile(rf"\s*(<=|>=|==|<|>)\s*({_NUMBER})\s*")
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


def _by_rating(conditions: Mapping[str, str]) -> Callable[[Any, str], int | None]:
    """Return a function (rating, where) -> number of the class whose condition the rating meets, None if it meets none."""
    tests = [_condition(name, text) for name, text in conditions.items()]
    names = list(conditions)

    def find(rating: Any, where: str) -> int | None:
        text = sources.label_text(rating)
        if not re.fullmatch(_NUMBER, text):
            raise BadInput("rating is not a number", where=where, found=repr(rating))
        met = [index for index, test in enumerate(tests) if test(float(text))]
        if len(met) > 1:
            raise BadInput(
                "a rating meets two conditions", where=where, found=f"{text} in {names[met[0]]!r} and {names[met[1]]!r}"
            )
        return met[0] if met else None

    return find


def _condition(name: str, text: str) -> Callable[[float], bool]:
    """Parse a condition such as `>= 1, < 3` into a function of a rating."""
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
    """Read all rows of a file, or of the split `role` of a data set, as (text, label); each must have a label."""
    rows = read_rows(source, role, (columns.text, columns.label))
    for row in rows:
        if row.cells[1] is None or row.cells[1] == "":
            raise BadInput("row without a label", where=f"{source}, row {row.number}")
    return rows
