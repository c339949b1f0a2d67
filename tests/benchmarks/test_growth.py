"""docs/performance.md shows what benchmarks/results/growth.json says, and the parts of the script do what they say."""

from __future__ import annotations

import gzip
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from emomerge.recipe import parse_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("growth")


def points(*cpu: float) -> list[dict[str, float]]:
    return [{"units": 4 << number, "cpu": value, "memory": 100.0 + 10 * number} for number, value in enumerate(cpu)]


def test_the_page_shows_the_stored_results(growth: ModuleType) -> None:
    text = growth.PAGE.read_text(encoding="utf-8")
    assert growth.page(text, growth.load()) == text, "run `python benchmarks/growth.py plot`"


def test_every_size_of_every_axis_is_a_recipe(growth: ModuleType) -> None:
    for axis in growth.AXES.values():
        for count in growth.sizes(axis):
            recipe = growth.united(growth.united(growth.RECIPE, {"task": {"train": "images.gz"}}), axis.recipe(count))
            parse_recipe(recipe)
            assert recipe["task"].keys() >= {"kind", "limit", "train"}


def test_what_a_doubling_adds_is_divided_by_the_units_it_adds(growth: ModuleType) -> None:
    linear, square = points(5.0, 9.0, 17.0), points(16.0, 64.0, 256.0)
    assert growth.added(linear, "cpu") == [1.0, 1.0]
    assert growth.spread(growth.added(linear, "cpu")) == 0.0
    assert growth.added(square, "cpu") == [12.0, 24.0]
    assert growth.spread([12.0, 24.0]) == pytest.approx(1 / 3)


def test_the_least_of_two_measurements_counts(growth: ModuleType) -> None:
    assert growth.least_of(points(5.0, 9.0), points(6.0, 8.0)) == points(5.0, 8.0)


def test_the_section_shows_each_point_and_what_it_adds(growth: ModuleType, tmp_path: Path) -> None:
    found = {"machine": "a CPU", "load": 0.1, "torch": "2.0", "repeats": 2}
    text = growth.section({**found, "points": {"rows": points(5.0, 9.0), "parameters": points(16.0, 64.0, 256.0)}})
    assert "| rows; 1,000 rows | 0.004 | 5.0 s | 100 MB |  |  |" in text
    assert "|  | 0.008 | 9.0 s | 110 MB | 1000.00 s | 2500.00 MB |" in text
    assert "|  | 16 | 256.0 s | 120 MB | 24.00 s | 1.25 MB |" in text
    assert "at most 0 % (rows), 33 % (parameters)" in text
    assert "the least of 2 runs or more" in text and "busy" not in text
    growth.plot({"parameters": points(5.0, 9.0)}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_images_are_idx_files_of_ten_classes(growth: ModuleType, tmp_path: Path) -> None:
    growth.write_images(tmp_path, 30)
    images = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    assert len(images) == 16 + 30 * 28 * 28 and len(labels) == 8 + 30 and set(labels[8:]) <= set(range(10))
