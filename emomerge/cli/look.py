"""`emomerge init --from DATA`: look at data, guess the task, its columns and sensible lengths, and write a commented recipe."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from emomerge.errors import BadInput, shown
from emomerge.files import JsonObject, parse_json, require_regular

TABLES = (".tsv", ".csv", ".jsonl", ".ndjson")
TEXTS = (".txt", ".md", ".rst", ".py")
PICTURES = (".png", ".jpg", ".jpeg")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "rating", "stars", "score")
TEXT_NAMES = ("text", "sentence", "review", "content", "comment", "message", "body", "document", "tweet", "title")
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query")
COMPLETION_NAMES = ("completion", "answer", "response", "output", "reply")
LOOKED_AT = 20_000
"""Rows that are looked at; more are counted only."""
BASES = {
    "text-classification": "sentence-transformers/all-MiniLM-L6-v2",
    "image-classification": "google/vit-base-patch16-224-in21k",
    "causal-lm": "Qwen/Qwen2.5-0.5B",
}
"""Task → a small model of the Hub, to begin with."""
BATCH = {"text-classification": 16, "image-classification": 16, "causal-lm": 8}


@dataclass(frozen=True)
class Look:
    """What a look at the data found.

    Args:
        kind: the task.
        rows: how many rows there are.
        settings: fields of the recipe's `task` besides `kind`, `train` and the split.
        facts: what was seen, line by line.
    """

    kind: str
    rows: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Sequence[str] = ()


def look_at(path: Path) -> Look:
    """Look at a table, a text file, or a folder of images or texts.

    Raises:
        BadInput: there is nothing there, or nothing that a task reads.
    """
    if not path.exists():
        raise BadInput("no such data", where=path, expected="a .tsv, .csv or .jsonl file, or a folder of images or texts")
    if path.is_dir():
        return _folder(path)
    require_regular(path)
    if path.suffix.lower() in TABLES:
        return _table(path)
    if path.suffix.lower() in TEXTS:
        text = path.read_text(encoding="utf-8", errors="replace")
        return _documents([part for part in re.split(r"\n\s*\n", text) if part.strip()], "paragraphs")
    raise BadInput("not data that a task reads", where=path, expected=f"one of {', '.join((*TABLES, *TEXTS))}, or a folder")


def recipe_text(look: Look, data: Path, out: Path, base: str | None) -> str:
    """Return a commented recipe for what was found.

    Args:
        look: what was found.
        data: where the data are.
        out: where the recipe will be; data beside or below it are named relative to it.
        base: the model to fine-tune, a Hub id or folder; by default a small one of the Hub.
    """
    batch = BATCH[look.kind]
    held_out = 0.5 if look.rows < 1_000 else 0.3 if look.rows < 3_000 else max(0.02, min(0.3, round(1_800 / look.rows, 3)))
    train_rows = look.rows * (1 - held_out)
    steps = int(min(500, max(40, math.ceil(3 * train_rows / batch / 5))))
    epochs = 5 * steps * batch / train_rows
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.stem).strip("-._") or "mine"
    task = {"kind": look.kind, "train": _relative(data, out), **look.settings, "eval_fraction": held_out}
    lines = [
        f"# Written by `emomerge init --from {shown(data)}`, which saw {look.rows:,} rows.",
        *(f"#   {shown(fact)}" for fact in look.facts),
        "# Check the guesses below.",
        "",
        f"name: {_yaml(name)}",
        "",
        f"base: {{model: {_yaml(base or BASES[look.kind])}}}   # a Hub id or a folder",
        "",
        "task:",
        *(f"  {key}: {_yaml(value)}{_REMARKS.get(key, '')}" for key, value in task.items()),
        "",
        "adapter: {kind: lora, rank: 8, alpha: 16, targets: all-linear}",
        "",
        "runs:",
        f"  steps: {steps}          # of each of five runs: in all, {epochs:.0f} passes over {train_rows:,.0f} training rows",
        f"  batch_size: {batch}",
        "",
        "# what the result is compared with; adamw-long-run, three tuned long runs, is the strongest and the dearest",
        "controls: [best-single, adamw-sweep, adamw-soup, distance-matched, long-run]",
        "",
        "probe: {preset: quick, batches: 1, batch_size: 32, directions: 6}   # a first impression; standard is thorough",
    ]
    return "\n".join(lines) + "\n"


_REMARKS = {
    "eval_fraction": "     # held out: half for choices, half for the report",
    "max_length": "          # tokens; longer texts are cut",
}


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
        .removesuffix("\n...\n")
        .strip()
    )


def _relative(data: Path, out: Path) -> str:
    """Return the data's path as the recipe should give it: relative if both lie in one folder, so that both can be moved."""
    absolute, folder = data.resolve(), out.resolve().parent
    return os.path.relpath(absolute, folder) if absolute.is_relative_to(folder) else str(absolute)


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(path: Path) -> Look:
    classes = {folder.name: _count(folder, PICTURES) for folder in sorted(path.iterdir()) if folder.is_dir()}
    classes = {name: count for name, count in classes.items() if count}
    if len(classes) >= 2:
        return Look("image-classification", sum(classes.values()), {}, [f"images in folders: {_counts(classes)}"])
    if count := _count(path, TEXTS):
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXTS][:LOOKED_AT]
        look = _documents([file.read_text(encoding="utf-8", errors="replace") for file in files[:200]], "files")
        return Look(look.kind, count, look.settings, look.facts)
    raise BadInput(
        "neither images in folders nor texts",
        where=path,
        expected=f"a sub-folder of {', '.join(PICTURES)} files for each class, or {', '.join(TEXTS)} files",
    )


def _count(folder: Path, endings: Sequence[str]) -> int:
    return sum(file.suffix.lower() in endings for file in folder.rglob("*"))


def _documents(texts: Sequence[str], what: str) -> Look:
    if not texts:
        raise BadInput("no text", where=what, expected="some words")
    settings = {"max_length": _tokens(texts, 512), "packing": "separate"}
    return Look("causal-lm", len(texts), settings, [f"{what} of {_length(texts)}"])


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Column:
    key: str | int
    """Its name, or its number in a file without header."""
    values: Sequence[Any]

    @property
    def texts(self) -> list[str]:
        return [str(value) for value in self.values]

    @property
    def distinct(self) -> int:
        return len(set(self.texts))

    @property
    def numbers(self) -> list[float] | None:
        try:
            return [float(value) for value in self.texts]
        except ValueError:
            return None

    def is_called(self, names: Sequence[str]) -> bool:
        return str(self.key).strip().lower() in names


def _table(path: Path) -> Look:
    columns, rows = _json_columns(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_columns(path)
    if not rows:
        raise BadInput("the data file has no rows", where=path, expected="rows below the header")
    chats = next((column for column in columns if isinstance(column.values[0], list)), None)
    if chats is not None:
        settings = {"columns": {"messages": chats.key}, "max_length": 1024}
        return Look("causal-lm", rows, settings, [f"{chats.key}: chats of {len(chats.values[0])} messages or so"])
    prompt, completion = (next((c for c in columns if c.is_called(names)), None) for names in (PROMPT_NAMES, COMPLETION_NAMES))
    if prompt is not None and completion is not None and completion.distinct > 20:
        both = [f"{a} {b}" for a, b in zip(prompt.texts, completion.texts, strict=True)]
        settings = {"columns": {"prompt": prompt.key, "completion": completion.key}, "max_length": _tokens(both, 1024)}
        return Look("causal-lm", rows, settings, [f"{c.key}: {_length(c.texts)}" for c in (prompt, completion)])
    label = _label(columns, rows)
    texts = [column for column in columns if column is not label and column.numbers is None]
    if not texts:
        raise BadInput("no column with text", where=path, expected="a column of words", found=f"{len(columns)} columns")
    text = max(texts, key=lambda column: (column.is_called(TEXT_NAMES), statistics.fmean(map(len, column.texts))))
    if label is None:
        settings = {"columns": {"text": text.key}, "max_length": _tokens(text.texts, 512), "packing": "separate"}
        return Look("causal-lm", rows, settings, [f"{text.key}: {_length(text.texts)}", "no column with labels"])
    return _classification(rows, text, label)


def _classification(rows: int, text: _Column, label: _Column) -> Look:
    settings: dict[str, Any] = {"columns": {"text": text.key, "label": label.key}}
    if label.numbers is not None and label.distinct > 20:
        middle = statistics.median(label.numbers)
        settings["classes"] = {"low": f"< {middle:g}", "high": f">= {middle:g}"}
        seen = f"{label.key}: numbers from {min(label.numbers):g} to {max(label.numbers):g}, cut at the median {middle:g}"
    else:
        seen = f"{label.key}: {_counts(Counter(label.texts))}"
    settings["max_length"] = _tokens(text.texts, 256)
    return Look("text-classification", rows, settings, [f"{text.key}: {_length(text.texts)}", seen])


def _label(columns: Sequence[_Column], rows: int) -> _Column | None:
    """Return the column that most likely holds labels: by its name, or by its few values."""
    few = [column for column in columns if 2 <= column.distinct <= min(50, max(2, rows // 4))]
    named = [column for column in columns if column.is_called(LABEL_NAMES) and column.distinct > 1]
    numeric = [c for c in columns if c.numbers is not None and not all(number.is_integer() for number in c.numbers)]
    return next(iter([c for c in named if c in few] or named or sorted(few, key=lambda c: c.distinct) or numeric), None)


def _json_columns(path: Path) -> tuple[list[_Column], int]:
    found: list[dict[str, Any]] = []
    rows = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                rows += 1
                if rows <= LOOKED_AT:
                    found.append(parse_json(line, JsonObject, where=f"{path}, row {number}", what="line is not a JSON object"))
    except UnicodeDecodeError as error:
        raise BadInput("the file is not UTF-8", where=path, found=error) from None
    names = [name for name in (found[0] if found else ()) if all(name in row for row in found)]
    return [_Column(name, [row[name] for row in found]) for name in names], rows


def _csv_columns(path: Path) -> tuple[list[_Column], int]:
    tabs = path.suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows, count = [], 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for cells in csv.reader(file, **dialect):
                if not cells:
                    continue
                count += 1
                if count <= LOOKED_AT:
                    rows.append(cells)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(
            "the file cannot be read", where=path, expected="UTF-8 text with a row on each line", found=error
        ) from None
    width = min(map(len, rows), default=0)
    header = bool(rows) and _has_header(rows[0][:width], [cells[:width] for cells in rows[1:]])
    body = rows[1:] if header else rows
    keys: Sequence[str | int] = rows[0][:width] if header else range(width)
    return [_Column(key, [cells[at] for cells in body]) for at, key in enumerate(keys)] if body else [], count - header


def _has_header(first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row names columns: it has no number, but a known name or one that its column does not repeat."""
    known = {*LABEL_NAMES, *TEXT_NAMES, *PROMPT_NAMES, *COMPLETION_NAMES, "id"}
    if any(_is_number(cell) or len(cell) > 40 for cell in first) or len(set(first)) < len(first):
        return False
    if any(cell.strip().lower() in known for cell in first):
        return True
    columns = list(zip(*rest, strict=True))
    return any(all(map(_is_number, column)) for column in columns) or any(
        len(set(column)) <= 20 and first[at] not in column for at, column in enumerate(columns) if len(column) > 40
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- words


def _tokens(texts: Sequence[str], most: int) -> int:
    """Return a length in tokens that 95 % of the texts fit into: a word is about 1.4 tokens."""
    words = sorted(len(text.split()) for text in texts)
    needed = 1.4 * words[int(0.95 * (len(words) - 1))] + 4
    return min(most, max(16, 16 * math.ceil(needed / 16)))


def _length(texts: Sequence[str]) -> str:
    example = " ".join(texts[0].split())
    example = example if len(example) <= 60 else f"{example[:57]}…"
    words = statistics.fmean(len(text.split()) for text in texts)
    return f"{words:.0f} words on average, such as {json.dumps(example, ensure_ascii=False)}"


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {count:,}" for name, count in ordered[:8])
    return listed + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
