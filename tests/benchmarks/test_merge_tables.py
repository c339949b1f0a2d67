"""docs/performance.md shows the stored results about merging."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("merge_tables")


def test_files_show_the_stored_results(tables: ModuleType) -> None:
    for file, text in tables.files().items():
        assert file.read_text(encoding="utf-8") == text, f"run `python benchmarks/merge_tables.py`: {file.name} is stale"


def test_another_result_changes_the_file(tables: ModuleType, tmp_path: Path) -> None:
    for _, (file, source, _) in tables.TABLES.items():
        text = (BENCHMARKS / "results" / source).read_text(encoding="utf-8")
        stored = json.loads(text)
        for row in stored["rows"]:
            row["seconds"] = row["peak GB"] = 12345.0
        (tmp_path / source).write_text(json.dumps(stored), encoding="utf-8")
        assert "12345" in tables.files(tmp_path)[tables.ROOT / file]
