"""The probe's memory: one JSON line for every evaluation, so that an interrupted probe resumes and ends with equal results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Key: TypeAlias = tuple[Any, ...]
FIELDS = ("model", "data", "metric", "radius", "direction", "batch")
"""What identifies an evaluation: hashes of model and data, then where it was taken."""


class Ledger:
    """Evaluations keyed by (model hash, data hash, metric, radius, direction, batch).

    Args:
        path: a JSONL file, created when the first row comes; None keeps the rows in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[Key, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._rows[self._key(row)] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a damaged row is only evaluated again
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    @staticmethod
    def _key(row: Mapping[str, Any]) -> Key:
        return tuple(row[field] for field in FIELDS)

    def get(self, **key: Any) -> dict[str, Any] | None:
        """The row of a key (all of FIELDS), or None."""
        return self._rows.get(self._key(key))

    def ask(self, evaluate: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
        """The row of a key: from memory, or evaluated now and written down at once."""
        known = self.get(**key)
        if known is not None:
            return known
        row = {**{field: key[field] for field in FIELDS}, **evaluate()}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._rows[self._key(row)] = row
        return row

    def __len__(self) -> int:
        return len(self._rows)
