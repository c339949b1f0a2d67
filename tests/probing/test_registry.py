"""Metrics as recipes name them: presets, options, and what a metric without a report of its own shows."""

import dataclasses

import numpy as np
import pytest

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.probing import METRICS
from emomerge.probing.registry import Measurement, direction_indices, find, metric, recipe_metrics

QUICK = {"gaussian", "curve"}
STANDARD = QUICK | {"adaptive", "hessian", "span", "basin", "barriers"}
FULL = STANDARD | {"worst-case", "plane", "surface"}


def names(metrics):
    return {found.name for found in metrics}


@pytest.mark.parametrize(("preset", "wanted"), [("quick", QUICK), ("standard", STANDARD), ("full", FULL)])
def test_presets_of_recipes(preset, wanted):
    every, close = recipe_metrics(recipe.Probe(preset=preset))
    assert names(every) == QUICK
    assert names(close) == wanted


def test_a_recipe_adds_metrics_by_name():
    every, close = recipe_metrics(recipe.Probe(preset="quick", metrics=("layers",)))
    assert names(every) == QUICK
    assert names(close) == QUICK | {"layers"}
    assert names(recipe_metrics(recipe.Probe(), ["basin"])[0]) == {"basin"}


def test_options_of_a_recipe_reach_the_metric():
    probe = recipe.Probe(directions=3, radii=(0.2,), options={"gaussian": {"radii": [0.5]}, "basin": {"rise": 1}})
    assert METRICS["gaussian"].options_of(probe) == {"radii": [0.5], "directions": 3}
    assert METRICS["basin"].options_of(probe) == {"rise": 1.0}
    assert METRICS["gaussian"].directions(probe) == 3
    assert METRICS["basin"].directions(probe) is None
    assert METRICS["gaussian"].passes(METRICS["gaussian"].options_of(probe), batches=2) == 2 * 3 * 2


def test_a_sample_of_directions_restricts_a_metric():
    few = dataclasses.replace(METRICS["gaussian"], sample=(1, 2))
    assert few.options_of(recipe.Probe(directions=3))["directions"] == [1, 2]
    assert few.directions(recipe.Probe(directions=3)) == 2
    assert few.passes(few.options_of(recipe.Probe(directions=3)), batches=5) == 2 * 3 * 2 * 5
    assert METRICS["gaussian"].in_few(recipe.Probe(directions=32)).sample == tuple(range(8))
    assert METRICS["gaussian"].in_few(recipe.Probe()).options_of(recipe.Probe())["radii"] == [0.03]
    assert METRICS["adaptive"].in_few(recipe.Probe()).options_of(recipe.Probe())["radii"] == [0.1]
    assert METRICS["gaussian"].in_few(recipe.Probe(directions=3)).options_of(recipe.Probe())["radii"] == (0.01, 0.03, 0.1)
    assert (
        METRICS["gaussian"].in_few(recipe.Probe(directions=3)).sample is METRICS["basin"].in_few(recipe.Probe()).sample is None
    )
    chosen = recipe.Probe(options={"gaussian": {"directions": [7, 3, 9, 4]}})
    assert few.options_of(chosen)["directions"] == [3, 9]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["gausian"]}, "no such metric: probe.metrics; .*found gausian; did you mean gaussian"),
        ({"metrics": ["distance"]}, "every report contains this metric: distance"),
        ({"options": {"bassin": {}}}, "no such metric: probe.options; .*did you mean basin"),
        ({"options": {"basin": {"raise": 1}}}, "no such option: probe.options.basin; .*found raise; did you mean rise"),
        ({"options": {"basin": {"rise": "high"}}}, "valid number.*: probe.options.basin.rise; found 'high'"),
        ({"options": {"hessian": {"hvp": "exact"}}}, "probe.options.hessian.hvp; found 'exact'"),
        ({"options": {"gaussian": {"on_direction": 1}}}, "no such option: probe.options.gaussian"),
    ],
)
def test_a_recipe_with_unknown_metrics_or_options_is_refused(section, message):
    with pytest.raises(BadInput, match=message):
        recipe_metrics(recipe.Probe.model_validate({"preset": "full", **section}))


def test_empty_fields_leave_no_trace_in_hashes():
    assert {"metrics", "options"}.isdisjoint(recipe.Probe().model_dump())
    assert recipe.Probe(metrics=("layers",)).model_dump(mode="json")["metrics"] == ["layers"]


def test_a_metric_without_a_report_becomes_a_column_or_a_detail(monkeypatch):
    monkeypatch.setattr("emomerge.probing.registry.METRICS", {})

    @metric("answer")
    def answer(probe):
        """The answer to everything."""
        return Measurement(np.array(42.0), 42.0)

    ((column, estimate),) = find("answer", "here").report(42.0, "model").figures
    assert (column.key, column.meaning, estimate.mean) == ("answer", "The answer to everything", 42.0)
    assert find("answer", "here").report({"a": 1}, "model").row == {"details": {"answer": {"a": 1}}}


def test_direction_indices():
    assert [*direction_indices(3)] == [0, 1, 2]
    assert [*direction_indices([5, 2])] == [5, 2]
