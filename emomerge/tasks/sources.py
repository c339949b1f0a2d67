"""What tasks on files and `datasets` ids share: finding data, splitting rows, and turning labels into classes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.extras import needed_by
from emomerge.recipe import DataSection
from emomerge.tasks.base import Split

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_ENDINGS = {
    ".tsv",
    ".csv",
    ".jsonl",
    ".ndjson",
    ".json",
    ".txt",
    ".gz",
    ".zip",
    ".parquet",
    ".png",
    ".jpg",
    ".jpeg",
}


def local_path(source: str) -> Path | None:
    """Return the file or folder that a recipe names, or None for a name that can only be a `datasets` id.

    Raises:
        BadInput: it is neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(source) and path.suffix.lower() not in _FILE_ENDINGS and "ubyte" not in path.name:
        return None
    raise BadInput("no such data file or folder", where=source)


def hub_dataset(name: str, split: str, columns: Sequence[str | int]) -> Any:
    """Load one split of a `datasets` id.

    Args:
        name: the id.
        split: the split's name.
        columns: those that it must have.

    Raises:
        BadInput: the data set cannot be loaded or lacks a column.
    """
    from emomerge.tasks.pretrained import quiet

    with needed_by("a data set of the Hub"):
        import datasets

    with quiet():
        try:
            data = datasets.load_dataset(name, split=split)
        except Exception as error:  # network, access, format: many types, each with its own message
            raise BadInput(
                "neither a file or folder nor a data set that `datasets` can load",
                where=f"{name}, split {split}",
                found=f"{type(error).__name__}: {error}"[:200],
            ) from None
    for column in columns:
        find_column(column, data.column_names, name)
    return data


def class_names(data: Any, column: str) -> list[Any]:
    """Return the labels of a `datasets` column, with the numbers of a ClassLabel replaced by their names."""
    names = getattr(data.features[column], "names", None)
    labels = list(data[column])
    return labels if names is None else [names[k] if k is not None and k >= 0 else None for k in labels]


def find_column(column: str | int, names: Sequence[str], where: object) -> str:
    """Return the column if it is among the names. Raises BadInput that lists the names if it is not."""
    if column in names:
        return str(column)
    near = difflib.get_close_matches(str(column), names, n=1, cutoff=0.5)
    shown = ", ".join(name if len(name) <= 30 else name[:29] + "…" for name in names)
    fix = f"did you mean {near[0]!r}?" if near else "set task.columns"
    raise BadInput(f"no column {column!r}", where=where, found=f"columns {shown}", fix=fix)


def split_rows(rows: int, section: DataSection, *, validation: bool, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row numbers of train, validation and test: one seeded shuffle, cut at `section.limit`, its head held out.

    Args:
        rows: number of rows.
        section: provides `seed`, `limit` and `eval_fraction`.
        validation, test: whether that split is taken from these rows; if not, it is empty.

    Raises:
        BadInput: a split would be empty.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(section.seed))[: section.limit]
    held = max(validation + test, round(len(order) * section.eval_fraction)) if validation or test else 0
    if len(order) <= held:
        raise BadInput("too few rows", where=section.train, expected=f"at least {held + 1}", found=len(order))
    middle = held if not test else (held + 1) // 2 if validation else 0
    return order[held:], order[:middle], order[middle:held]


def label_text(label: object) -> str:
    """Return a label as it is written in a recipe: 1, spam, true."""
    return str(label).lower() if isinstance(label, bool) else str(label).strip()


def distinct_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels, sorted as numbers if all are integers."""
    found = set(labels)
    whole = all(re.fullmatch(r"[+-]?\d+", label) for label in found)
    return tuple(sorted(found, key=int if whole else None))


def class_index(classes: Sequence[str]) -> Callable[[str, str], int]:
    """Return a function (label, where) -> number of its class.

    A label is a class name or, if no class name is an integer, a class number from 0.
    """
    numbers = {name: index for index, name in enumerate(classes)}
    if not any(re.fullmatch(r"[+-]?\d+", name) for name in classes):
        numbers |= {str(index): index for index in range(len(classes))}

    def find(label: str, where: str) -> int:
        if label not in numbers:
            raise BadInput("label outside the classes", where=where, expected=_listed(classes), found=repr(label))
        return numbers[label]

    return find


def check_classes(train: Tensor, classes: Sequence[str], where: str) -> None:
    """Check that there are at least two classes and that each has a training row.

    Args:
        train: class numbers (rows,).
        classes: their names.
        where: name of the data in messages.

    Raises:
        BadInput: there are fewer classes, or one has no row.
    """
    if len(classes) < 2:
        raise BadInput("classification needs two classes", where=where, found=_listed(classes) or "none")
    counts = torch.bincount(train, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            fix = "raise task.limit, or give the class more rows"
            raise BadInput(f"no training row of class {name!r}", where=where, fix=fix)


def summarize(splits: Sequence[Split], classes: Sequence[str], left_out: int = 0) -> str:
    """Describe the data in one line for the report."""
    train, validation, test = (f"{len(split):,}" for split in splits)
    text = f"{sum(map(len, splits)):,} rows in {len(classes)} classes"
    if left_out:
        text += f"; {left_out:,} left out"
    return f"{text}; {train} to train, {validation} to validate, {test} to test"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
