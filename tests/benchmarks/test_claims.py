"""The claims: units are measured once, verdicts are read from all units, and docs/claims.md shows the stored results."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("claims")
    made.load_claims()
    return made


def made(claims: ModuleType, **changes: Any) -> Any:
    core = importlib.import_module("claims_core")
    about: dict[str, Any] = {
        "name": "made-up", "says": "It works.", "source": "here", "control": "None.", "taught": "Nothing.",
        "arms": ({"rule": "a"}, {"rule": "b"}), "measure": lambda arm, seed, effort: {"loss": float(seed)},
        "judge": lambda units: core.Verdict("holds", f"{len(units.all)} units.", [["arm"], ["a"]]),
    }  # fmt: skip
    return core.Claim(**{**about, **changes})


def test_a_finished_unit_is_not_measured_again_and_one_that_fails_stops_nothing(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def measure(arm: dict[str, Any], seed: int, effort: Any) -> dict[str, float]:
        calls.append((arm["rule"], seed))
        if arm["rule"] == "a" and seed == 1:
            raise ValueError("too bad")
        return {"loss": 1.0}

    monkeypatch.setitem(claims.CLAIMS, "made-up", made(claims, measure=measure))
    monkeypatch.setattr(claims.torch, "set_num_threads", lambda count: None)
    effort, file = claims.Effort(), tmp_path / "made-up.jsonl"
    core = importlib.import_module("claims_core")
    for expected in (6, 1):
        calls.clear()
        known = core.Store(file).lines
        claim = claims.CLAIMS["made-up"]
        todo = [(arm, seed) for arm, seed in claim.planned(effort) if claim.key(arm, seed) not in known]
        errors = [claims.measure("made-up", arm, seed, effort, file) for arm, seed in todo]
        assert len(calls) == expected
        assert next(error for error in errors if error).endswith("too bad\n")
    assert core.Store(file).missing(claim) == 1


def test_a_verdict_is_read_only_once_every_unit_is_there(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, claim = importlib.import_module("claims_page"), made(claims)
    monkeypatch.setattr(page, "CLAIMS", {"made-up": claim})
    assert "not measured yet | 6 units are missing" in page.summary(tmp_path)
    line = {"figures": {"loss": 1.0}, "cpu": 3.0, "emomerge": "1", "torch": "2", "machine": {"cpu": "a CPU"}}
    keys = [claim.key(arm, seed) for arm, seed in claim.planned(claims.Effort())]
    (tmp_path / "made-up.jsonl").write_text("".join(json.dumps({"key": key, **line}) + "\n" for key in keys))
    assert "**holds** | 6 units." in page.summary(tmp_path)
    assert "**Holds.** 6 units." in page.page(tmp_path)


def test_estimates_are_paired_by_seed_and_a_diverged_unit_is_infinite(claims: ModuleType) -> None:
    core = importlib.import_module("claims_core")
    values = {"a": [1.0, 2.0, 3.0], "b": [0.5, 1.0, None]}
    units = core.Units(
        core.Unit({"rule": rule}, seed, {"loss": value}) for rule, found in values.items() for seed, value in enumerate(found)
    )
    assert units.paired("loss", {"rule": "a"}, {"rule": "b"}).values == (0.5, 1.0, -math.inf)
    assert units.estimate("loss", rule="b").mean == math.inf
    assert units.best("loss", units.arms()) == {"rule": "a"}


def test_every_claim_states_what_it_needs(claims: ModuleType) -> None:
    for name, claim in claims.CLAIMS.items():
        assert claim.says.endswith(".") and claim.control.endswith(".") and claim.taught.endswith("."), name
        keys = [claim.key(arm, seed) for arm, seed in claim.planned(claims.Effort())]
        assert len(keys) == len(set(keys)), name
        assert claim.seeds >= 3 or claim.seeds == 1, name


def test_the_page_shows_the_stored_results(claims: ModuleType) -> None:
    page = importlib.import_module("claims_page")
    assert page.page(claims.RESULTS) == page.PAGE.read_text(encoding="utf-8")


def test_the_short_form_measures_in_a_worker_and_decides_nothing(claims: ModuleType, tmp_path: Path) -> None:
    effort = claims.Effort(quick=True, cache=tmp_path)
    assert claims.run(["pulse-tables", "regret"], effort, tmp_path, jobs=1) == []
    core = importlib.import_module("claims_core")
    (line,) = core.Store(tmp_path / "pulse-tables.jsonl").lines.values()
    assert [cell["printed"] == cell["computed"] for cell in line["figures"]["cells"]] == [True] * 9
    assert all(line["figures"]["average"] > 0 for line in core.Store(tmp_path / "regret.jsonl").lines.values())
