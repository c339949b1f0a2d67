"""docs/performance.md shows the stored results about optimizers and runs in one pass."""

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
    return importlib.import_module("training_tables")


def test_the_page_shows_the_stored_results(tables: ModuleType) -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "run `python benchmarks/training_tables.py`"


def test_ratios_are_those_of_the_stored_figures(tables: ModuleType) -> None:
    place = {"machine": "a CPU", "load": 0.1, "torch": "2.0", "threads": 1, "dropout": 0.1}
    times = {"stacked": {"cpu": 2.0, "rss": 300.0}, "peft": {"cpu": 5.0, "rss": 1.0}, "one": {"cpu": 1.0, "rss": 250.0}}
    text = tables.stacked({"rows": [{"hidden": 128, "tokens": 16, **times, **place}]})
    assert "| 16 | 2.5 (goal 3.5), 1.2 × |" in text
    text = tables.stacked({"rows": [{"hidden": 128, "tokens": 16, **times, "base": {"cpu": 1.25}, **place}]})
    assert "| 16 | 2.5 (goal 3.5) of at most 4.0, 1.2 × |" in text
    assert "busy" not in text
    rows = [{"name": name, "set": "s", "threads": 1, "ratio": r, "bytes": 4.0} for name, r in (("Lion", 3.0), ("EmoCats", 0.5))]
    assert "| s | 0.50 | 3.00 |" in tables.optimizers({"rows": rows, "rounds": 3, **place, "load": 9.0})
    rows += [{**rows[1], "ratio": 4.0}, {**rows[1], "ratio": 9.0, "threads": 2}]
    assert tables.uncompiled({"rows": rows}).endswith("at 0.5 to 4.0 times fused AdamW.")


def test_rows_of_the_same_sizes_are_replaced(tables: ModuleType, tmp_path: Path) -> None:
    store, file = importlib.import_module("stacked_training").store, tmp_path / "r.json"
    for cpu in (1.0, 2.0):
        store(file, {"hidden": 64, "tokens": 16, "dropout": 0.1, "stacked": {"cpu": cpu}})
    store(file, {"hidden": 64, "tokens": 64, "dropout": 0.1, "stacked": {"cpu": 3.0}})
    assert [row["stacked"]["cpu"] for row in json.loads(file.read_text())["rows"]] == [2.0, 3.0]
