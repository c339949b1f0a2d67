"""What trackers are told of the steps."""

from typing import ClassVar

import pytest

from emomerge.errors import BadInput
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import parse_recipe
from emomerge.training import RunDir, planned_runs, train_locally


@pytest.fixture
def train(digits, context, tmp_path):
    recipe = digits[0]

    def train(*names, on_step=lambda spec, row: None):
        runs = recipe.runs.model_copy(update={"log_with": names, "optimizers": ("sens", "void"), "parallel": "sequential"})
        changed = recipe.model_copy(update={"runs": runs})
        train_locally(context(".", runs=runs), planned_runs(changed), on_step=on_step)
        return {name: list(RunDir(tmp_path / name).metrics()) for name in ("sens-0", "void-0")}

    return train


class Stub:
    opened: ClassVar = []

    def __init__(self, **options):
        self.options, self.rows, self.state = options, {}, "new"
        Stub.opened.append(self)

    def start(self):
        self.state = "started"

    def log(self, values, step):
        assert self.state == "started"
        self.rows[step] = values

    def finish(self):
        self.state = "finished"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_step_of_every_run_is_told(train, monkeypatch, name):
    monkeypatch.setitem(__import__("accelerate.tracking").tracking.LOGGER_TYPE_TO_CLASS, name, Stub)
    monkeypatch.setattr(Stub, "opened", [])
    rows = train(name)
    assert [tracker.options["name"] for tracker in Stub.opened] == ["sens-0", "void-0"]
    assert len({tracker.options.get("id", number) for number, tracker in enumerate(Stub.opened)}) == 2
    for tracker in Stub.opened:
        assert tracker.options["run_name"] == "t"
        assert tracker.state == "finished"
        for row in rows[tracker.options["name"]]:
            told = tracker.rows[row["step"]]
            assert {key: told[key] for key in ("rate", "loss", "sigma", "trust")} == {
                key: row[key] for key in ("rate", "loss", "sigma", "trust")
            }


class Stop(Exception):
    pass


def test_tensorboard_shows_each_step_once(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(spec, row):
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train("tensorboard", on_step=stop)
    rows = train("tensorboard")
    for name, expected in rows.items():
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        for key in ("rate", "loss", "sigma", "trust"):
            found = {event.step: event.value for event in events.Scalars(key)}
            assert found == pytest.approx({row["step"]: row[key] for row in expected}, rel=1e-6)
            assert len(events.Scalars(key)) == 6


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    recipe = parse_recipe({**tiny_recipe, "runs": {**tiny_recipe["runs"], "log_with": ["trackio"]}})
    with pytest.raises(BadInput, match="the tracker is not installed: runs.log_with = trackio; pip install trackio"):
        Pipeline(recipe, tmp_path / "out").train_all()
    assert not (tmp_path / "out").exists()
