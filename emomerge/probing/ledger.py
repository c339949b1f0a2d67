"""The ledger: one JSON line per evaluation, so that an interrupted probe can be resumed and gives the same results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from emomerge.errors import BadInput
from emomerge.files import JsonObject, parse_json, read_bytes

LARGEST = 2**32
Key: TypeAlias = tuple[Any, ...]
FIELDS = ("model", "data", "metric", "radius", "direction", "batch")
"""The key of an evaluation: hashes of model and data, and where in weight space it was taken."""


class Ledger:
    """Evaluations keyed by (model hash, data hash, metric, radius, direction, batch).

    Args:
        path: a JSONL file, created with the first row; None keeps the rows in memory.
        known: another ledger, or its file, whose rows need no evaluation; it is only read.
    """

    def __init__(self, path: Path | None = None, known: Path | Ledger | None = None) -> None:
        self.path = path
        self._rows: dict[Key, dict[str, Any]] = dict(known._rows) if isinstance(known, Ledger) else {}
        for file in (path, known):
            if isinstance(file, Path) and file.exists():
                self._read(file, repair=file is path)

    def _read(self, path: Path, *, repair: bool) -> None:
        text = read_bytes(path, largest=LARGEST).decode("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
        for line in whole.splitlines():
            try:
                row = parse_json(line, JsonObject, where=path)
                self._rows[self._key(row)] = row
            except (BadInput, KeyError, TypeError):
                continue  # a damaged row is evaluated again
        if repair and whole != text:
            path.write_text(whole, encoding="utf-8")

    @staticmethod
    def _key(row: Mapping[str, Any]) -> Key:
        return tuple(row[field] for field in FIELDS)

    def get(self, **key: Any) -> dict[str, Any] | None:
        """Return the row of a key (all of FIELDS), or None."""
        return self._rows.get(self._key(key))

    def ask(self, evaluate: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
        """Return the row of a key. If there is none, evaluate it and append it to the file at once."""
        known = self.get(**key)
        if known is not None:
            return known
        row = {**{field: key[field] for field in FIELDS}, **evaluate()}
        self._add([row])
        return row

    def ask_all(
        self, evaluate: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]], keys: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the rows of several keys. Those that are missing are evaluated together and appended to the file at once.

        Args:
            evaluate: (positions of the missing keys) → their results, in this order; not called if none is missing.
            keys: the keys, each all of FIELDS.
        """
        missing = [position for position, key in enumerate(keys) if self.get(**key) is None]
        if missing:
            found = zip(missing, evaluate(missing), strict=True)
            self._add([{**{field: keys[n][field] for field in FIELDS}, **row} for n, row in found])
        return [self._rows[self._key(key)] for key in keys]

    def take_over(self, other: Ledger) -> None:
        """Add those rows of another ledger that this one lacks."""
        self._add([row for key, row in other._rows.items() if key not in self._rows])

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.path is not None and rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self._rows |= {self._key(row): row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)
