"""What is measured before all controls are trained is what the probe would measure."""

import json
import shutil

import pytest
import torch

from emomerge.experiment.collect import measure_so_far
from emomerge.experiment.control_runs import trained_so_far
from emomerge.experiment.pipeline import Pipeline
from emomerge.probing.ledger import FIELDS
from emomerge.recipe import parse_recipe

CONTROLS = ["best-single", "adamw-sweep", "adamw-soup", "distance-matched", "long-run"]


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    torch.set_num_threads(1)
    runs = tiny_recipe["runs"] | {"optimizers": ["sens", "cats"]}
    probe = tiny_recipe["probe"] | {"directions": 4, "other_directions": 2}
    return tiny_recipe | {"runs": runs, "controls": CONTROLS, "probe": probe}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    pipeline = Pipeline(parse_recipe(recipe), tmp_path_factory.mktemp("ahead") / "out")
    assert pipeline.run()
    return pipeline


def before_the_controls(finished, recipe, folder):
    """Return a copy of a finished experiment whose long run is not done and of which nothing has been measured."""
    shutil.copytree(finished.space.out, folder)
    (folder / "evaluations.jsonl").unlink()
    (folder / "results.json").unlink()
    shutil.rmtree(next((folder / "runs").glob("long-*")))
    (folder / "stamps" / "controls.json").unlink()
    return Pipeline(parse_recipe(recipe), folder)


def evaluations(pipeline):
    rows = map(json.loads, pipeline.space.ledger.read_text().splitlines())
    return {tuple(row[field] for field in FIELDS): row for row in rows if not row["metric"].startswith("share of")}


def test_the_probe_finds_all_but_the_long_run_in_the_ledger(finished, recipe, tmp_path):
    pipeline = before_the_controls(finished, recipe, tmp_path / "out")
    assert {spec.control for spec in trained_so_far(pipeline)} == {"adamw-sweep"}
    pieces = sum(1 for _ in measure_so_far(pipeline))
    assert pieces > 10
    early, every = evaluations(pipeline), evaluations(finished)
    assert early.items() <= every.items()  # to the bit
    late = {(key[FIELDS.index("model")], key[FIELDS.index("metric")]) for key in every.keys() - early.keys()}
    measured_early = {key[FIELDS.index("model")] for key in early}
    assert {metric for model, metric in late if model in measured_early} <= {"curve", "noise floor"}
    assert all(finished.run_artefact(spec).hash in measured_early for spec in finished.specs)
    assert all(finished.merge_artefact(spec, 0).hash in measured_early for spec in finished.recipe.merge)


def test_without_the_control_that_directions_depend_on_only_the_judged_are_measured(finished, recipe, tmp_path):
    wider = recipe | {"controls": [*CONTROLS, "loss-matched"], "rival": {"snapshots": 2}}
    pipeline = before_the_controls(finished, wider, tmp_path / "out")
    for _ in measure_so_far(pipeline):
        pass
    sharp = {key[FIELDS.index("model")] for key in evaluations(pipeline) if key[FIELDS.index("metric")] == "gaussian"}
    judged = {pipeline.merge_artefact(pipeline.recipe.merge[0], 0).hash, pipeline.run_artefact(pipeline.best_run(0)).hash}
    assert judged <= sharp
    assert len(sharp) == 3  # and the best run at the merge's distance
