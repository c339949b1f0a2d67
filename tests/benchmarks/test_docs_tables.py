"""Pages show the stored results that benchmarks/docs_tables.py writes into them, and its parts say what the results say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLACE = {"machine": "a CPU", "load": 0.1, "torch": "2.0"}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("docs_tables")


def test_pages_show_the_stored_results(tables: ModuleType) -> None:
    for file, text in tables.pages().items():
        assert file.read_text(encoding="utf-8") == text, f"run `python benchmarks/docs_tables.py`: {file.name} is stale"


def test_a_page_without_the_place_of_a_part_is_refused(tables: ModuleType) -> None:
    page = f"# X\n\n{tables.start('a')}\n{tables.END}\n"
    assert tables.rewritten(page, "a", "0.5 s") == f"# X\n\n{tables.start('a')}\n\n0.5 s\n\n{tables.END}\n"
    with pytest.raises(SystemExit, match="0 parts"):
        tables.rewritten(page, "b", "0.5 s")


def times(**ways: tuple[float, float | None]) -> dict[str, Any]:
    """Results for a model whose λmax is 10, from CPU seconds and the λmax that was found, of each way and all its jobs."""
    rows = [
        {"name": name.replace("_", " "), "job": job, "cpu": cpu, "largest": None if job == "trace" else found}
        for name, (cpu, found) in ways.items()
        for job in ("λmax", "trace")
    ]
    return {"largest": 10.0, "within": 0.005, "probes": 32, "rounds": 3, "peers": {"pyhessian": "0.1"}, **PLACE, "rows": rows}


def test_the_cheapest_way_counts_and_a_wrong_eigenvalue_does_not(tables: ModuleType) -> None:
    results = times(a=(1.0, 9.0), b=(3.0, 10.04), c=(2.0, 9.96))
    assert tables.cell(results, ("a", "b", "c"), "λmax") == 2.0
    assert tables.cell(results, ("a",), "λmax") == "λmax misses by 10.0 %"
    assert tables.cell(results, ("a", "b"), "trace") == 1.0
    assert tables.cell(results, ("a", "b"), "all") == ""
    assert tables.marked([2.0, "", 12.34, 1.999]) == ["2.00", "", "12.3", "**2.00**"]


def test_the_table_of_the_hessian_says_where_and_how_much_memory(tables: ModuleType) -> None:
    ours = times(emomerge=(1.0, 10.0), PyHessian=(2.0, 10.0))
    ours["rows"] += [{"name": "emomerge", "job": "all", "cpu": 4.0, "largest": 10.0}]
    peaks = {"training step": 100.0, "λmax": 90.0, "finite-difference": 110.0, "autograd": 130.0}
    memory = {"rows": [{"what": what, "peak": peak} for what, peak in peaks.items()]}
    text = tables.hessian({"times": {"cnn": ours, "vit": ours}, "memory": {"cnn": memory}})
    assert "| CNN: λmax | **1.00** |  |  |  |  | 2.00 |" in text and "| ViT: all | **4.00** |" in text
    assert "λmax to 0.5 %" in text and "a CPU, torch 2.0, one thread, median of 3 rounds; pyhessian 0.1." in text
    assert "up to 1.1 times that of a training\nstep" in text and text.endswith("up to 1.3 times.")


def test_what_perturbed_weights_cost_in_memory(tables: ModuleType) -> None:
    text = tables.perturbing(
        {"rows": [{"way": way, "grown": x} for way, x in (("in place", 3.2), ("kept", 1.3), ("redrawn", 0.3))]}
    )
    assert "This takes 1.3 × the model's memory more, against 3.2 ×" in text and "takes 0.3 ×" in text


def test_figures_of_one_model_are_kept_beside_those_of_the_other(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = importlib.import_module("probe_vs_peers")
    monkeypatch.setattr(peers, "version", lambda name: "1.0")
    file = tmp_path / "x.json"
    for part, kind, value in (("times", "cnn", 1), ("times", "vit", 2), ("memory", "cnn", 3), ("times", "cnn", 4)):
        peers.store(file, part, kind, {"rows": [value]})
    stored = json.loads(file.read_text(encoding="utf-8"))
    found = {part: {kind: results["rows"] for kind, results in of.items()} for part, of in stored.items()}
    assert found == {"times": {"cnn": [4], "vit": [2]}, "memory": {"cnn": [3]}}
    assert stored["times"]["vit"]["peers"].keys() == {"pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch"}
