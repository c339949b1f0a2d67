import pytest
import torch

from emomerge.checkpoints import open_checkpoint
from emomerge.merging import merge
from emomerge.recipe import Ema, Full, Lawa, Runs
from emomerge.training import RunSpec, train_run
from emomerge.training.average import WeightAverage
from emomerge.training.run import TrainingRun, damping


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture
def train(digits, context):
    recipe, task, _ = digits

    def train(name="sens-0", folder="runs", on_step=lambda spec, row: None, task=task, adapter=recipe.adapter, **options):
        runs = Runs(**{"procedure": "paper", "preset": "guarded", "steps": 6, "batch_size": 8, "lr": 20.0, **options})
        spec = RunSpec(name, name.partition("-")[0], 0, runs.steps)
        made = context(folder, task=task, runs=runs, adapter=adapter)
        train_run(made, spec, on_step)
        return made.run_dir(spec)

    return train


def rates(run):
    return [row["rate"] for row in run.metrics()]


def test_every_optimizer_has_its_rate(train):
    plain = {name: rates(train(name, "plain", lr=1.0))[0] for name in ("sens-0", "cats-0")}
    assert rates(train("sens-0", lr={"sens": 3.0}))[0] == pytest.approx(3 * plain["sens-0"])
    assert rates(train("cats-0", lr={"sens": 3.0}))[0] == plain["cats-0"]


def test_the_rate_falls_to_nothing_over_the_last_share():
    assert [damping(0.5, step, 8) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert damping(0.0, 7, 8) == 1
    assert damping(1.0, 0, 8) == 1
    assert damping(1.0, 7, 8) == 1 / 8


def test_cooldown_shows_in_the_metrics_and_changes_nothing_before(train):
    plain, cooled = train(folder="plain", steps=8), train(steps=8, cooldown=0.5)
    before, after = rates(plain), rates(cooled)
    assert before[:5] == after[:5]
    rows = list(cooled.metrics())
    factors = [row["rate"] / min(3e-3, row["dnr"] * 20 * 1e-4) for row in rows]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert plain.state["sha256"] != cooled.state["sha256"]


class Quiet:
    """A task whose loss is small from the beginning, which the v3.9 rule takes for rest as soon as it trusts it."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        return 1e-3 * self._task.loss(model, batch)


def test_a_run_stops_at_the_signal_and_says_so(train, digits):
    options = {"task": Quiet(digits[1]), "preset": "v3.9", "lr": 1.0, "steps": 40}
    whole = list(train(folder="whole", **options).metrics())
    first = next(row["step"] for row in whole if row["should_stop"])
    assert 1 < first < 40
    run = train(early_stop=True, **options)
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in whole[:first]]
    assert run.state["steps_taken"] == first
    assert run.state["state"] == "done"

    def stop(spec, row):
        if row["step"] == first - 1:
            raise Stop

    with pytest.raises(Stop):
        train(folder="cut", on_step=stop, early_stop=True, checkpoint_every=3, **options)
    assert train(folder="cut", early_stop=True, checkpoint_every=3, **options).state["sha256"] == run.state["sha256"]


def weights(folder):
    return dict(open_checkpoint(next(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("average", ["lawa", {"kind": "lawa", "last": 1.0}, "ema", {"kind": "ema", "decay": 0.5}])
def test_the_average_is_that_of_the_weights_on_the_way(train, monkeypatch, average):
    steps = []
    taken = TrainingRun.take_step

    def watched(self, *args):
        taken(self, *args)
        steps.append({name: tensor.detach().double() for name, tensor in self.learnt.items()})

    monkeypatch.setattr(TrainingRun, "take_step", watched)
    run = train(average=average, adapter=Full(kind="full"))
    plain = train(folder="plain", adapter=Full(kind="full"))
    assert run.artefact.name == "model-average"
    assert weights(run.path / "model").keys() == weights(plain.artefact).keys()
    for name, tensor in weights(plain.artefact).items():
        assert torch.equal(weights(run.path / "model")[name], tensor)  # an average changes nothing of the run
    how = Runs(average=average).average
    if how.kind == "lawa":
        factors = [0, 0, 0, 1, 1, 1] if how.last == 0.5 else [1] * 6
    else:
        factors = [how.decay ** (6 - step) for step in range(1, 7)]
    averaged = weights(run.artefact)
    mean = sum(factor * state["classifier.weight"] for factor, state in zip(factors, steps, strict=False)) / sum(factors)
    torch.testing.assert_close(averaged["classifier.weight"].double(), mean, rtol=1e-5, atol=1e-7)


def test_an_average_survives_a_kill(train):
    whole = train(folder="whole", average="ema", checkpoint_every=2)

    def stop(spec, row):
        if row["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(average="ema", checkpoint_every=2, on_step=stop)
    assert train(average="ema", checkpoint_every=2).state["sha256"] == whole.state["sha256"]


def test_both_weights_are_kept_and_the_recipe_says_which_are_merged(train, base_folder):
    full = Full(kind="full")
    average, last = (train(folder=use, average={"kind": "lawa", "use": use}, adapter=full) for use in ("average", "last"))
    base = open_checkpoint(base_folder)
    assert last.artefact.name == "model"
    for name in ("model", "model-average"):
        assert weights(average.path / name).keys() == weights(last.path / name).keys()
        for key, tensor in weights(average.path / name).items():
            assert torch.equal(weights(last.path / name)[key], tensor)
    by_run, by_folder = (merge(base, [path], method="mean") for path in (average.path, average.path / "model-average"))
    other = merge(base, [last.path], method="mean")
    name = next(name for name in base if not torch.equal(by_run[name], base[name]))
    assert torch.equal(by_run[name], by_folder[name])
    assert not torch.equal(by_run[name], other[name])
    next((average.path / "model").glob("*.safetensors")).unlink()
    assert not average.is_done("i")


def test_averages_are_taken_in_float32_and_leave_integers_alone():
    learnt = {"w": torch.zeros(1, dtype=torch.bfloat16), "count": torch.tensor(3)}
    average = WeightAverage(Lawa(kind="lawa", last=1.0), learnt, 0, 4)
    for step in range(1, 5):
        learnt["w"] += 1 / 128 if step == 1 else 1
        average.update(step)
    assert average.tensors.keys() == {"w"}
    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"].item() == pytest.approx(sum([1 / 128, 1.0078125, 2.0, 3.0]) / 4)


def test_an_average_has_no_bias_towards_its_beginning():
    learnt = {"w": torch.ones(1)}
    average = WeightAverage(Ema(kind="ema", decay=0.9), learnt, 10, 20)
    average.update(11)
    learnt["w"].fill_(2.0)
    average.update(12)
    assert average.tensors["w"].item() == pytest.approx((0.9 * 1 + 2) / 1.9)
