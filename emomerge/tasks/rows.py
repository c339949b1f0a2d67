"""Read rows of TSV, CSV and JSONL files and of `datasets` ids."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emomerge.errors import BadInput
from emomerge.files import JsonObject, parse_json, require_regular
from emomerge.tasks import sources

Columns = Sequence[str | int]
"""By name (the first row is then a header) or by number from 0 (the file then has no header)."""

ENDINGS = (".tsv", ".csv", ".jsonl", ".ndjson")


class Row(NamedTuple):
    """One row, restricted to the requested columns."""

    cells: tuple[Any, ...]
    number: int
    """Line of the file (its last, where a quoted cell has several), or row of the data set, from 1."""


def read_rows(source: str, role: str, columns: Columns) -> list[Row]:
    """Read all rows of a file, or of the split `role` of a data set. Raises BadInput if they cannot be read."""
    path = sources.local_path(source)
    return _read_hub(source, role, columns) if path is None else _read_file(path, columns)


def _read_hub(name: str, split: str, columns: Columns) -> list[Row]:
    data = sources.hub_dataset(name, split, columns)
    cells = [sources.class_names(data, str(column)) for column in columns]
    return [Row(row, n) for n, row in enumerate(zip(*cells, strict=True), start=1)]


def _read_file(path: Path, columns: Columns) -> list[Row]:
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInput("not text data", where=path, expected="a .tsv, .csv or .jsonl file, or a `datasets` id")
    require_regular(path)
    try:
        if not path.stat().st_size:
            raise BadInput("the data file is empty", where=path, expected="rows")
        rows = list(reader(path, columns))
        if not rows:
            raise BadInput("the data file has no rows", where=path, expected="rows below the header")
        return rows
    except UnicodeDecodeError as error:
        raise BadInput("the file is not UTF-8", where=path, found=error) from None
    except (OSError, csv.Error) as error:
        raise BadInput("the file cannot be read", where=path, found=error) from None


def _read_tsv(path: Path, columns: Columns) -> Iterator[Row]:
    return _read_table(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    return _read_table(path, columns, strict=True)


def _read_table(path: Path, columns: Columns, **dialect: Any) -> Iterator[Row]:
    """Read rows of cells; the first row holds the columns' names if the recipe uses names."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file, **dialect)
        header = next(table, []) if any(isinstance(column, str) for column in columns) else []
        positions = [_position(column, header, path) for column in columns]
        for cells in table:
            if not cells:
                continue
            if max(positions) >= len(cells):
                raise BadInput(
                    "row with too few columns",
                    where=f"{path}, row {table.line_num}",
                    expected=f"a column {max(positions)}, counted from 0",
                    found=f"{len(cells)} columns",
                )
            yield Row(tuple(cells[position] for position in positions), table.line_num)


def _position(column: str | int, header: Sequence[str], path: Path) -> int:
    if isinstance(column, str):
        return header.index(sources.find_column(column, header, path))
    if column < 0:
        raise BadInput("columns are counted from 0", where="task.columns", found=column)
    return column


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Row]:
    """Read one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            row = parse_json(line, JsonObject, where=where, what="line is not a JSON object")
            yield Row(tuple(row[sources.find_column(column, list(row), where)] for column in columns), number)
