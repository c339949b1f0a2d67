"""docs/performance.md shows what benchmarks/results/main_job.json says, and figures are compared as the script says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("main_job")


def test_the_page_shows_the_results(job: ModuleType) -> None:
    text = job.PAGE.read_text(encoding="utf-8")
    shown = text.partition(job.START)[2].partition(job.END)[0].strip()
    assert shown == job.section(job.load())


def test_differences_are_those_of_figures_and_not_of_times(job: ModuleType) -> None:
    def results(loss: float, seconds: float, **more: float) -> dict[str, object]:
        row = {"name": "mean", "seconds": seconds, "estimates": {"test_loss": {"mean": loss, **more}}}
        return {"created": str(seconds), "artefacts": [row], "traces": {"sens-0": {"loss": [1.0, 200.0 * loss]}}}

    found = job.difference(results(0.5, 1), results(0.75, 2, low=3.0))
    assert found == {
        "figures": 3, "equal": 1, "only_before": 0, "only_after": 1, "largest": pytest.approx(1 / 3),
        "where": "traces.sens-0.loss[1]", "loss": 0.25,
    }  # fmt: skip


def test_the_section_shows_ratios_of_pairs(job: ModuleType, tmp_path: Path) -> None:
    runs = [
        {"which": which, "wall": wall, "cpu": cpu}
        for which, wall, cpu in (
            ("before", 100.0, 200.0), ("after", 40.0, 60.0), ("before", 120.0, 220.0), ("after", 60.0, 78.0),
            ("before, one thread", 90.0, 90.0),
        )
    ]  # fmt: skip
    same = {"figures": 1234, "equal": 1200, "largest": 0.00002, "loss": 0.0}
    found = {
        "recipe": "digits", "machine": {"cpu": "a CPU", "cores": 2}, "runs": runs,
        "difference": {**same, "loss": 0.034}, "difference_one_thread": same,
    }  # fmt: skip
    text = job.section(found)
    assert "| CPU | 210 s | 69 s | 0.33 (0.30–0.35) |" in text
    assert "| wall | 110 s | 50 s | 0.45 (0.40–0.50) |" in text
    assert "2 pairs of runs on 2 cores" in text and "1,200 are to the bit\nthose of the code before" in text
    assert "losses differ by up to 0, any figure by up to 2e-05 " in text and "differ by up to 0.03." in text
    page = tmp_path / "page.md"
    page.write_text("# Speed\n")
    assert job.write_section(page, "one") and not job.write_section(page, "one") and job.write_section(page, text)
    assert page.read_text().count("## The main job") == 1 and page.read_text().endswith(f"{job.END}\n")
