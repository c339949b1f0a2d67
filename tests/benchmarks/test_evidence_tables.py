"""README.md and docs/evidence.md show the results in benchmarks/results/, computed as they say."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MADE_WITH = {"emomerge": "1.0", "torch": "2.0", "machine": {"cpu": "a CPU", "cores": 2}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence_tables")


def row(test: float | None, passes: float = 100, cpu: float = 2.0) -> dict[str, Any]:
    return {"artefact": "x", "validation": 1.0, "test": test, "passes": passes, "cpu": cpu}


def write(folder: Path, table: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps({**line, **MADE_WITH}) + "\n" for line in lines)
    (folder / f"{table}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of two tasks; the sweep is worse by 0.1, 0.2 and 0.3 on one task, and diverges on the other."""
    lines = [{"task": "vit", "seed": 0, "unit": "ours", "rows": {"ours": row(9.0)}}]  # replaced by a later line
    for seed in range(3):
        for task, sweep in (("mild", 0.6 + 0.1 * seed), ("vit", None)):
            lines.append({"task": task, "seed": seed, "unit": "ours", "rows": {"base": row(2.0, 0), "ours": row(0.5)}})
            lines.append(
                {
                    "task": task,
                    "seed": seed,
                    "unit": "adamw-sweep",
                    "rows": {"adamw-sweep": row(sweep, 150, 1.5 if sweep else 5.0)},
                }
            )
    write(tmp_path, "defaults", lines)
    rates = {"0.01": [1.0, 3.0], "0.1": [1.0, 2.0], "1": [1.0, 1.5], "10": [1.0, 1.8], "100": [1.0, 6.0]}
    auto: dict[str, Any] = {"losses": {"0.01": [1.0, 0.7], "1": [1.0, 0.7]}, "sha256": {"0.01": {"a": "b"}, "1": {"a": "b"}}}
    write(
        tmp_path,
        "rates",
        [
            {"task": "mild", "seed": 0, "unit": "adamw", "losses": rates, "sha256": {"1": "c"}},
            {"task": "mild", "seed": 0, "unit": "prodigy", "losses": {**rates, "100": [None, None]}, "sha256": {"1": "d"}},
            {"task": "mild", "seed": 0, "unit": "auto", **auto},
        ],
    )
    return tmp_path


def test_files_show_the_stored_results(tables: ModuleType) -> None:
    for file, text in tables.files().items():
        assert file.read_text(encoding="utf-8") == text, f"run `python benchmarks/evidence_tables.py`: {file.name} is stale"


def test_what_the_documentation_says_of_the_claims_is_what_was_measured(tables: ModuleType) -> None:
    """docs/explanation/paper.md and README.md state these in words."""
    found = tables.Defaults(tables.RESULTS)

    def loss(task: str, name: str) -> float:
        return float(found.test(task, name).mean)

    learnt = [task for task in found.tasks if loss(task, "paper-best-single") < 0.99 * loss(task, "base")]
    assert set(found.tasks) - set(learnt) == {"minilm-400"}
    assert all(loss(task, "paper-tall-mask") > loss(task, "paper-best-single") for task in learnt)
    assert all(loss(task, "ours") < min(loss(task, "adamw-sweep"), loss(task, "adamw-soup")) for task in found.tasks)
    long_is_better = [task for task in found.tasks if loss(task, "adamw-long-run") < loss(task, "ours")]
    assert len(long_is_better) > len(found.tasks) / 2 and "small" not in long_is_better


def test_writing_twice_changes_nothing(tables: ModuleType, results: Path) -> None:
    once = tables.rewritten(f"before\n{tables.START}\nstale text\n{tables.END}\nafter\n", results)
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "stale text" not in once
    assert tables.rewritten(once, results) == once
    assert tables.document(results) == tables.document(results)


def test_a_readme_without_markers_is_refused(tables: ModuleType, results: Path) -> None:
    with pytest.raises(SystemExit, match="0 parts"):
        tables.rewritten("no markers", results)


def test_differences_are_paired_and_have_student_intervals(tables: ModuleType, results: Path) -> None:
    found = tables.Defaults(results).difference("mild", "adamw-sweep")
    assert found.mean == pytest.approx(-0.2)
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # two degrees of freedom
    assert found.sign == 0, "the interval contains 0"
    assert tables.Estimate((-0.2, -0.21, -0.22)).sign == -1
    assert tables.Estimate((-0.2,)).sign == 0, "one seed has no interval"


def test_summary_counts_tasks_and_compares_costs(tables: ModuleType, results: Path) -> None:
    head, base, ours, sweep = tables.Defaults(results).summary()
    assert head[1:3] == ["FashionMNIST MLP, mild", "digits ViT, LoRA"]
    assert base[1:3] == ["2.000 ± 0.000"] * 2
    assert ours[1:] == ["**0.500 ± 0.000**"] * 2 + ["1", "1", ""]
    assert sweep[1:] == ["0.700 ± 0.058", "diverged", "1.5", "0.75 – 2.5", "2 of 2 (0 / 0)"]
    write(results, "defaults", [*tables.Defaults(results).lines[:-1]])
    assert "2 to 3 training seeds; emomerge" in tables.readme_block(results), "a unit lacks a seed"


def test_the_readme_has_a_row_for_each_claim_and_bold_only_where_nothing_is_lower(tables: ModuleType, tmp_path: Path) -> None:
    rows = {"ours": row(0.5), "adamw-soup": row(0.6), "long-run": row(0.4)}
    write(tmp_path, "defaults", [{"task": "mild", "seed": seed, "unit": "u", "rows": rows} for seed in (0, 1)])
    block = tables.readme_block(tmp_path)
    assert "| greedy soup of the sweep | 0.600±0.000 | 1 | 1 of 1 (1 / 0) |" in block
    assert "one long run" not in block and "**0.500" not in block, "the long run's row is in the evidence only, and is lower"


def test_conditions_are_named(tables: ModuleType, results: Path) -> None:
    assert "3 training seeds; emomerge 1.0 on torch 2.0; a CPU, 2 cores" in tables.readme_block(results)


def test_losses_are_named(tables: ModuleType, results: Path, tmp_path: Path) -> None:
    lines = [{"task": "mild", "seed": 0, "unit": "u", "rows": {"ours": row(0.5), "adamw-long-run": row(0.45)}}]
    write(tmp_path, "defaults", lines)
    assert "lower on 0 of 1 (0 / 0); higher on FashionMNIST MLP, mild (+0.050)" in tables.document(tmp_path)


def test_rates_give_best_and_worst(tables: ModuleType, results: Path) -> None:
    rates = tables.Rates(results)
    cells = dict(rates.summary()[1:])
    assert cells["AdamW, cosine"] == "1.500, × 4.00"
    assert cells["Prodigy, cosine"] == "1.500, diverges"
    assert cells["EmoSens, `auto`"] == "0.700, × 1.00"
    assert cells["five runs, `auto` (default)"] == "0.500, × 1.00"
    assert rates.same_bits() == ("mild", ["0.01", "1"], True)
    assert "`lr` 0.01, 1 gave the same bits" in tables.document(results)


def test_other_bits_are_not_called_the_same(tables: ModuleType, results: Path) -> None:
    text = (results / "rates.jsonl").read_text(encoding="utf-8").replace('"1": {"a": "b"}', '"1": {"a": "c"}')
    (results / "rates.jsonl").write_text(text, encoding="utf-8")
    assert "DIFFERENT" in tables.document(results)


def test_an_unmeasured_table_says_so(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.readme_block(tmp_path) == tables.EMPTY
    assert tables.document(tmp_path).count("No results yet") == 3


def test_merges_are_compared_with_the_plain_mean_of_the_same_runs(tables: ModuleType, results: Path) -> None:
    assert "`python benchmarks/evidence.py methods` measures them" in tables.document(results)
    lines = [
        {"task": "vit", "seed": seed, "unit": "separate", "losses": {"mean-of-runs": [9, mean], "ties-of-runs": [9, ties]}}
        for seed, (mean, ties) in enumerate([(0.5, 0.4), (0.7, 0.59), (0.6, 0.48)])
    ]
    write(results, "methods", lines)
    head, mean, ties = tables.Methods(results).summary("separate")
    assert head == ["merge", "digits ViT, LoRA", "lower than the mean on"]
    assert mean == ["mean of runs", "0.600 ± 0.058", ""]
    assert ties == ["ties of runs", "0.490 ± 0.055", "1 of 1 (1 / 0)"]
    document = tables.document(results)
    assert "### Five runs that never meet" in document and tables.MERGED["rounds"] not in document
