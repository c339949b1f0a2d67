"""The harness of the evidence: units are measured once, and every task's recipe can be read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from emomerge.errors import NonFiniteLossError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence")


def plan(evidence: ModuleType, folder: Path, table: str = "defaults", **changes: Any) -> Any:
    fields = {"fashion": folder / "fashion", "reviews": folder / "reviews.tsv", "quick": False, **changes}
    return evidence.Plan(table, folder / "cache", folder / "results", **fields)


@pytest.fixture
def calls(evidence: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the units of every task by a good one and one that fails; lists the units that were measured."""
    done: list[str] = []

    def good() -> dict[str, Any]:
        done.append("good")
        return {"rows": {}}

    def bad() -> dict[str, Any]:
        done.append("bad")
        raise ValueError("too bad")

    monkeypatch.setattr(evidence.Study, "units", lambda self: {"bad": ([], bad), "good": ([], good)})
    monkeypatch.setattr(evidence.Study, "key", lambda self, unit, changes: f"key of {unit}")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return done


def test_a_finished_unit_is_not_measured_again(evidence: ModuleType, calls: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert evidence.measure(plan(evidence, tmp_path), "mild", 1) == ["mild, seed 1, bad: ValueError: too bad"]
    assert calls == ["bad", "good", "bad"]
    (line,) = map(json.loads, (tmp_path / "results" / "defaults.jsonl").read_text().splitlines())
    assert (line["task"], line["seed"], line["unit"], line["torch"]) == ("mild", 1, "good", torch.__version__)


def test_only_the_units_asked_for_are_measured(evidence: ModuleType, calls: list[str], tmp_path: Path) -> None:
    assert evidence.measure(plan(evidence, tmp_path, units=("good",)), "mild", 0) == []
    assert calls == ["good"]


def test_a_unit_of_another_recipe_is_measured_again(
    evidence: ModuleType, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence.measure(plan(evidence, tmp_path), "mild", 0)
    monkeypatch.setattr(evidence.Study, "key", lambda self, unit, changes: "another key")
    evidence.measure(plan(evidence, tmp_path), "mild", 0)
    assert calls.count("good") == 2


@pytest.mark.parametrize(("table", "least"), [("defaults", 5), ("rates", 5), ("methods", 2)])
def test_recipes_of_all_units_can_be_read(
    evidence: ModuleType, table: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "minilm", lambda: tmp_path / "minilm")
    asked, elsewhere = plan(evidence, tmp_path, table), plan(evidence, tmp_path / "elsewhere", table)
    for task in evidence.TASKS:
        study = evidence.Study(asked, task, 0)
        keys = {unit: study.key(unit, changes) for unit, (changes, _) in study.units().items()}
        assert len(set(keys.values())) == len(keys) >= least
        assert keys == {unit: evidence.Study(elsewhere, task, 0).key(unit, study.units()[unit][0]) for unit in keys}


def test_tasks_have_names_in_the_tables(evidence: ModuleType) -> None:
    tables = importlib.import_module("evidence_tables")
    assert set(evidence.TASKS) == set(tables.TASKS)
    assert set(evidence.DEFAULT_RATES) <= set(tables.OPTIMIZERS)


def test_a_peer_decays_ends_in_its_average_and_refuses_a_loss_that_is_not_finite(evidence: ModuleType) -> None:
    class Optimizer(torch.optim.SGD):
        rates: tuple[float, ...] = ()
        averaged = False

        def step(self, closure: Any = None) -> None:
            self.rates += (self.param_groups[0]["lr"],)

        def eval(self) -> None:
            self.averaged = True

    optimizer = Optimizer([nn.Parameter(torch.zeros(1))], lr=2.0)
    peer = evidence.Peer(optimizer, 4, cosine=True)
    for _ in range(4):
        assert not optimizer.averaged
        peer.observe(torch.tensor(1.0))
        peer.step()
    assert optimizer.averaged
    assert optimizer.rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    peer.observe(torch.tensor(torch.nan))
    with pytest.raises(NonFiniteLossError):
        peer.step()
    assert len(optimizer.rates) == 4
