"""docs/robustness.md shows what benchmarks/results/hostile.json holds."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("hostile_tables")


def test_the_page_is_up_to_date(tables) -> None:
    results = json.loads((ROOT / "benchmarks/results/hostile.json").read_text())
    assert tables.page(results) == (ROOT / "docs/robustness.md").read_text()


def test_every_part_is_counted_once_and_failures_that_are_left_show(tables) -> None:
    part = {"trials": 3, "accepted": 1, "refused": 1, "failures": {"x": 1}}
    names = [name for parts in tables.KINDS.values() for name in parts]
    fault = {"kind": "data", "trials": 2, "what": "this."}
    shown = tables.page({"campaigns": [{"parts": dict.fromkeys(names, part)}] * 2, "mended": [fault], "coverage": "none"})
    assert len(names) == len(set(names))
    count = 2 * len(names)
    assert f"| **all** | **{3 * count}** | **{count}** | **{count}** | **2** | **{count}** |" in shown
    assert "- data: this." in shown
