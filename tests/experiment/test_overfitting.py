"""Long runs that overfit: they end early unless other controls need their steps, and their best point is what counts."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from emomerge.errors import EmomergeError
from emomerge.experiment import overfitting
from emomerge.experiment.ahead import ledger_of, train_ahead
from emomerge.experiment.control_runs import long_run
from emomerge.experiment.overfitting import has_memorized, has_risen
from emomerge.experiment.pipeline import Pipeline
from emomerge.experiment.workers import take_over
from emomerge.probing.ledger import Ledger
from emomerge.recipe import parse_recipe
from emomerge.results import load_results
from emomerge.training import Context, RunDir, RunSpec, planned_runs
from emomerge.training.ahead import GroupJob

CONTROLS = ["best-single", "adamw-sweep", "distance-matched", "long-run"]


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    torch.set_num_threads(1)
    runs = tiny_recipe["runs"] | {"optimizers": ["sens", "cats"]}
    rival = tiny_recipe["rival"] | {"snapshots": 6}
    return tiny_recipe | {"runs": runs, "rival": rival, "controls": CONTROLS, "merge": tiny_recipe["merge"][:2]}


def planned(recipe, **changes):
    made = parse_recipe({**recipe, **changes})
    return long_run(made, planned_runs(made)[0])


def row_of(out):
    return next(row for row in load_results(out).artefacts if row.control == "long-run")


def test_a_loss_has_risen_if_it_is_well_above_the_lowest():
    assert has_risen([1.0, 0.8, 1.01]) and has_risen([1.0, math.inf])
    assert not has_risen([1.0, 0.8, 0.99]) and not has_risen([1.0]) and not has_risen([math.inf, math.inf])
    assert has_risen([-1.0, -0.7]) and not has_risen([-1.0, -0.8]), "losses may be negative"


def test_patience_asks_for_several_losses_in_a_row():
    assert not has_risen([0.5, 0.6, 0.7], patience=2) and has_risen([0.5, 0.7, 0.7], patience=2)
    assert not has_risen([0.5, 0.7, 0.6, 0.7], patience=2)


def test_rows_are_memorized_where_the_training_loss_is_far_below_the_lowest_validation_loss():
    assert has_memorized(0.1, [0.8, 0.41]) and not has_memorized(0.11, [0.8, 0.41])
    assert has_memorized(-2.0, [-1.0]) and not has_memorized(-1.0, [-1.0])


@pytest.mark.parametrize(
    ("is_trunk", "trained", "expected"),
    [
        (False, [9, 9, 0.1, 0.1], True),
        (False, [0.1, 0.1, 0.1, 9], False),
        (True, [9, 9, 9, 0.1], True),
        (True, [0.1, 0.1, 0.1, 9], False),
    ],
)
def test_runs_overfit_only_if_they_have_lately_memorized(recipe, tmp_path, monkeypatch, is_trunk, trained, expected):
    made = Pipeline(parse_recipe(recipe), tmp_path / "out")
    steps = 12 if is_trunk else 24
    spec = RunSpec("long", "sens", 0, steps, control="long-run", is_trunk=is_trunk, snapshots=(1, 2, 4, 6))
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([9, 9, *trained], 1)]
    monkeypatch.setattr(RunDir, "metrics", lambda self: iter(rows))
    monkeypatch.setattr(overfitting, "snapshot_loss", lambda measurer, spec, step: {1: 1.0, 2: 0.6, 4: 0.9, 6: 0.9}[step])
    measurer = SimpleNamespace(context=Context(made.recipe, tmp_path, "", tmp_path))
    assert overfitting.overfits(measurer, spec, 6) is expected


def test_a_long_run_ends_early_only_if_nothing_else_needs_its_steps(recipe):
    alone = planned(recipe)
    assert alone.ends_early and alone.snapshots == (2, 4, 6, 8, 10)
    for control in ("loss-matched", "swa"):
        shared = planned(recipe, controls=[*CONTROLS, control])
        assert not shared.ends_early and shared.snapshots == (2, 4, 6, 8, 10, 12)
    assert not planned(recipe, runs=recipe["runs"] | {"average": {"kind": "ema"}}).ends_early


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, {"kind": "full"}], ids=["lora", "full"])
def test_a_long_run_that_overfits_ends_there_and_its_best_point_counts(recipe, tmp_path, monkeypatch, adapter):
    losses = {2: 0.6, 4: 0.5, 6: 0.6, 8: 0.7, 10: 0.7}
    monkeypatch.setattr(overfitting, "snapshot_loss", lambda measurer, spec, step: losses[step])
    monkeypatch.setattr(overfitting, "MEMORIZED", -10.0)
    out, lines = tmp_path / "out", []
    made = Pipeline(parse_recipe(recipe | {"adapter": adapter}), out)
    monkeypatch.setattr(made.display, "say", lines.append)
    assert made.run()
    (spec,) = (spec for spec in made.trained_controls if spec.control == "long-run")
    assert made.run_dir(spec).state["steps_taken"] == 10
    assert [line for line in lines if line.startswith(spec.name)] == [
        f"{spec.name}: stopped at step 10 of 12, where it overfits"
    ]
    row = row_of(out)
    kept = {folder.name for folder in (made.run_dir(spec).path / "snapshots").glob("*")}
    assert row.mean("examples") == 10 * made.recipe.runs.batch_size
    assert kept == {"step-000004"}
    points = [made.run_artefact(spec), made.snapshot_artefact(spec, 4)]
    lowest = min(points, key=lambda point: made.measurer.loss(point, "validation"))
    assert row.path == str(lowest.path)
    assert row.name == (spec.name if lowest.name == spec.name else f"{spec.name} until step 4")
    assert not Pipeline(parse_recipe(recipe | {"adapter": adapter}), out).run(), "nothing to do"


def test_what_a_worker_does_stops_a_long_run_where_this_process_does(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(overfitting, "OVERFITTED", -1.0)
    monkeypatch.setattr(overfitting, "MEMORIZED", -10.0)
    here, there = (Pipeline(parse_recipe(recipe), tmp_path / name) for name in ("here", "there"))
    assert here.run()
    (spec,) = (spec for spec in here.trained_controls if spec.control == "long-run")
    assert here.run_dir(spec).state["steps_taken"] == 4
    shutil.copytree(here.space.base, there.space.base)
    shutil.copytree(here.space.out / "stamps", there.space.out / "stamps")
    assert train_ahead(GroupJob(there.context, (spec,)), there.space.ledger) is None
    assert there.run_dir(spec).state["sha256"] == here.run_dir(spec).state["sha256"]
    assert not there.space.ledger.exists(), "that of the main process is its own"
    found = Ledger(there.space.ledger)
    take_over(found, [ledger_of(there.space.ledger, spec)])
    rows = {
        line for line in there.space.ledger.read_text().splitlines() if json.loads(line)["metric"] == "scores of validation"
    }
    assert rows and rows <= {*here.space.ledger.read_text().splitlines()}, "found again, to the bit"
    assert not ledger_of(there.space.ledger, spec).exists()


def test_an_error_of_a_worker_is_returned(recipe, tmp_path):
    made = Pipeline(parse_recipe(recipe), tmp_path / "out")
    made.begin()
    context = Context(made.recipe, tmp_path / "no-base", "", made.space.runs)
    error = train_ahead(GroupJob(context, (planned(recipe),)), made.space.ledger)
    assert isinstance(error, EmomergeError) and "no-base" in str(error)


def test_a_shared_long_run_keeps_its_snapshots_and_counts_at_its_best_point(recipe, tmp_path):
    made = Pipeline(parse_recipe(recipe | {"controls": [*CONTROLS, "loss-matched"]}), tmp_path / "out")
    assert made.run()
    (spec,) = (spec for spec in made.trained_controls if spec.control == "long-run")
    assert made.run_dir(spec).state["steps_taken"] == 12
    points = [made.snapshot_artefact(spec, step) for step in spec.snapshots]
    lowest = min(made.measurer.loss(point, "validation") for point in points)
    row = row_of(tmp_path / "out")
    assert row.mean("validation_loss") == pytest.approx(lowest)
    names = [row.name for row in load_results(tmp_path / "out").artefacts]
    assert len(names) == len(set(names))
