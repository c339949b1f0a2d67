"""A recipe's runs branch off from the trunk where the validation loss is lowest, and its weights can be merged."""

import json

import pytest
import torch

from emomerge.checkpoints import open_checkpoint
from emomerge.cli.status import status_of
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import parse_recipe
from emomerge.results import load_results
from emomerge.training import RunDir


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    torch.set_num_threads(1)
    runs = tiny_recipe["runs"] | {"steps": 8, "trunk": 0.5, "rounds": 2, "optimizers": ["sens", "cats"]}
    soup = {"method": "greedy-soup", "of": "rounds", "name": "soup-of-rounds"}
    return tiny_recipe | {"runs": runs, "merge": [soup, {"method": "mean"}], "controls": ["best-single"]}


def test_the_branch_point_has_the_lowest_validation_loss(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(RunDir, "remove_snapshots", lambda self, steps: None)
    made = Pipeline(parse_recipe(recipe), tmp_path / "out")
    made.train_all()
    (trunk,) = made.trunks
    assert trunk.snapshots == (1, 2, 4, 8)
    losses = {step: made.measurer.loss(made.snapshot_artefact(trunk, step), "validation") for step in trunk.snapshots}
    assert len(set(losses.values())) == 4
    best = min(losses, key=losses.__getitem__)
    start, chosen = (
        open_checkpoint(path) for path in (tmp_path / "out/runs/rounds-0/round-0", made.run_dir(trunk).snapshot(best))
    )
    assert all(torch.equal(start[name], chosen[name]) for name in start)


def test_a_trunk_that_overfits_ends_there_and_counts_for_less(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("emomerge.experiment.overfitting.OVERFITTED", -1.0)
    monkeypatch.setattr("emomerge.experiment.overfitting.MEMORIZED", -10.0)
    made = Pipeline(parse_recipe(recipe), tmp_path / "out")
    assert made.run()
    (trunk,) = made.trunks
    assert made.run_dir(trunk).state["steps_taken"] == 2
    results = load_results(tmp_path / "out")
    rows = (2 + 4 * 2) * made.recipe.runs.batch_size
    assert {row.mean("examples") for row in results.artefacts if row.role == "run"} == {rows}
    assert not Pipeline(parse_recipe(recipe), tmp_path / "out").run(), "nothing to do"


def test_trunk_is_merged_counted_and_named(recipe, tmp_path):
    made = Pipeline(parse_recipe(recipe), tmp_path / "out")
    assert made.run()
    out = tmp_path / "out"
    record = json.loads((out / "merges/soup-of-rounds/merge.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["trunk", "round-1", "round-2"]
    results = load_results(out)
    rows = 8 * 2 * made.recipe.runs.batch_size
    assert {row.mean("examples") for row in results.artefacts if row.name in ("sens-0", "mean", "soup-of-rounds")} == {rows}
    assert any("a trunk" in caveat for caveat in results.verdict.caveats)
    card = (out / "merges/soup-of-rounds/README.md").read_text()
    assert "from the trunk and the means of the runs after 2 rounds over" in card
    assert "for 4 steps" in (out / "runs/sens-0/adapter/README.md").read_text()
    assert "after a trunk" in (out / "runs/sens-0/adapter/README.md").read_text()
    assert [(run["name"], run["steps"], run["state"]) for run in status_of(out)["runs"]][:2] == [
        ("trunk-0", 8, "done"), ("sens-0", 4, "done"),
    ]  # fmt: skip
    assert not Pipeline(parse_recipe(recipe), out).run(), "nothing to do"
