import math

import pytest
import torch

from emomerge.checkpoints import open_checkpoint
from emomerge.errors import BadInput, RunFailed
from emomerge.recipe import FAMILY
from emomerge.training import RunDir, RunSpec, planned_runs, run_inputs, train_locally, train_run
from emomerge.training.order import BatchOrder


class Stop(Exception):
    """Stands for a kill: nothing of the run survives it but its files."""


@pytest.fixture
def train(context):
    def train(name="sens-0", folder="runs", stop_after=None, task=None, inputs="i", **changes):
        made = context(folder, task=task, base_hash=inputs, **changes)
        optimizer, seed = name.split("-")

        def on_step(spec, row):
            if row["step"] == stop_after:
                raise Stop

        spec = RunSpec(name, optimizer, int(seed), made.recipe.runs.steps)
        train_run(made, spec, on_step)
        return made.run_dir(spec)

    return train


def weights(run):
    return dict(open_checkpoint(next(run.artefact.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", [f"{optimizer}-0" for optimizer in FAMILY])
def test_a_run_killed_at_any_step_ends_with_the_same_bits(train, name, kind):
    from emomerge.recipe import Full, Lora

    adapter = Lora(kind="lora", rank=2, alpha=4, dropout=0.2) if kind == "lora" else Full(kind="full")
    options = {"adapter": adapter, "runs": {"use_shadow": True, "accumulation": 2}}
    whole = train(name, "whole", **options)
    for step in (1, 2, 5):
        with pytest.raises(Stop):
            train(name, f"cut{step}", stop_after=step, **options)
        run = train(name, f"cut{step}", **options)
        assert run.state["sha256"] == whole.state["sha256"]
        rows = list(run.metrics())
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [r["loss"] for r in rows] == [r["loss"] for r in whole.metrics()]
        assert not run.checkpoint.exists()


def test_conditions_are_identical_and_only_the_optimizer_differs(train):
    runs = [train(f"{optimizer}-0") for optimizer in FAMILY]
    first = {next(run.metrics())["loss"] for run in runs}
    assert len(first) == 1  # same weights, same adapter, same rows, same dropout
    assert len({str(run.state["sha256"]) for run in runs}) == 5
    assert next(train("sens-1").metrics())["loss"] not in first
    assert next(train("cats-0", "different", runs={"data_order": "different"}).metrics())["loss"] not in first


def test_accumulation_sees_the_same_rows_and_the_same_pulse(train):
    options = {"adapter": {"dropout": 0.0}}
    whole = list(train(folder="a", runs={"batch_size": 16, "accumulation": 1}, **options).metrics())
    parts = list(train(folder="b", runs={"batch_size": 4, "accumulation": 4}, **options).metrics())
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["rate"] == pytest.approx(b["rate"], rel=1e-6)


def test_training_lowers_the_loss_and_moves_only_the_adapter(train):
    run = train(runs={"steps": 100, "lr": 30.0})
    rows = list(run.metrics())
    assert sum(r["loss"] for r in rows[-10:]) < 0.95 * sum(r["loss"] for r in rows[:10])
    assert all("lora_" in name for name in weights(run))
    assert run.state["artefact"] == "adapter"
    assert {"step", "loss", "rate", "sigma", "trust", "dnr", "should_stop", "seconds"} <= set(rows[0])


def test_a_full_run_loads_by_itself(train, digits, base_folder):
    from emomerge.recipe import Full

    run = train(adapter=Full(kind="full"))
    base, trained = open_checkpoint(base_folder), open_checkpoint(run.artefact)
    assert trained.names() == base.names()
    assert not torch.equal(trained["classifier.weight"], base["classifier.weight"])
    digits[1].reload_model(run.artefact)


def test_sens_leaves_the_squared_gradients_of_a_full_run(train, digits, base_folder):
    from emomerge.merging import merge, reference
    from emomerge.recipe import Full

    full = {"adapter": Full(kind="full")}
    runs = [train("sens-0", **full), train("sens-1", **full)]
    files = [run.path / "fisher.safetensors" for run in runs]
    base, found = open_checkpoint(base_folder), [open_checkpoint(file) for file in files]
    assert found[0].names() == tuple(name for name in base if base[name].is_floating_point())
    assert all((fisher[name] >= 0).all() and fisher[name].any() for fisher in found for name in base if "weight" in name)
    merged = merge(base, [run.path for run in runs], method="fisher")
    given = merge(base, [run.artefact for run in runs], method="fisher", information=tuple(map(str, files)))
    name = "classifier.weight"
    taus = torch.stack([open_checkpoint(run.artefact)[name] - base[name] for run in runs])
    expected = reference.fisher(taus, torch.stack([fisher[name] for fisher in found]), torch.ones(2))
    assert torch.equal(merged[name], given[name])
    torch.testing.assert_close(merged[name], base[name] + expected)

    train("sens-0")  # an adapter, in the same directory
    assert not files[0].exists()
    cats = train("cats-0", **full)
    assert not (cats.path / "fisher.safetensors").exists()
    with pytest.raises(BadInput, match=f"a run without squared gradients: {cats.path}.*`information`"):
        merge(base, [runs[1].path, cats.path], method="fisher")


def test_squared_gradients_after_one_step_are_those(train, digits, base_folder):
    from emomerge.recipe import Full

    recipe, task, data = digits
    run = train("sens-0", adapter=Full(kind="full"), runs={"steps": 1, "checkpoint_every": 1})
    model = task.reload_model(base_folder, trust_remote_code=False)
    rows = BatchOrder(len(data.train), recipe.runs.batch_size, 0).batch(0)
    task.loss(model.train(), data.train.batch(rows)).backward()
    fisher = open_checkpoint(run.path / "fisher.safetensors")
    torch.testing.assert_close(fisher["classifier.weight"], model.classifier.weight.grad.square(), rtol=1e-4, atol=1e-12)


def test_bfloat16_autocast_and_clipping_train(train):
    rows = list(train(runs={"precision": "bfloat16", "max_grad_norm": 0.1}).metrics())
    assert all(math.isfinite(row["loss"]) for row in rows)


class Poisoned:
    """A task whose loss is NaN whenever a given row of the training data is in the batch."""

    def __init__(self, task, label):
        self._task, self._label = task, label

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        self._label -= 1
        loss = self._task.loss(model, batch)
        return loss * float("nan") if self._label < 0 else loss


def test_a_non_finite_loss_ends_the_run_with_step_and_rows_and_keeps_its_checkpoint(train, digits):
    with pytest.raises(RunFailed, match=r"run sens-0 failed: .* at step 4, rows \d+, \d+.* of the training data"):
        train(task=Poisoned(digits[1], 3))
    run = train()  # the same directory, healthy again: resumes from step 2
    assert run.state["state"] == "done"
    assert run.state["error"] is None
    assert run.state["sha256"] == train(folder="whole").state["sha256"]


def test_the_other_runs_go_on(digits, context, tmp_path):
    recipe, task, _ = digits
    specs = planned_runs(recipe)[:3]
    broken = Poisoned(task, 7)  # six steps of the first run, then the second one's second step
    with pytest.raises(RunFailed, match="run airy-0 failed"):
        train_locally(context(".", task=broken), specs[:2])
    states = {spec.name: RunDir(tmp_path / spec.name).state["state"] for spec in specs[:2]}
    assert states == {"sens-0": "done", "airy-0": "failed"}
    train_locally(context("."), specs)
    assert all(RunDir(tmp_path / s.name).is_done(run_inputs(recipe, s, "b")) for s in specs)


def test_a_checkpoint_of_other_inputs_is_not_resumed(train):
    with pytest.raises(Stop):
        train(stop_after=5, inputs="other")
    assert train().state["sha256"] == train(folder="whole").state["sha256"]


def test_a_damaged_checkpoint_is_named(train):
    with pytest.raises(Stop):
        train(stop_after=5)
    run = RunDir(train(folder="x").path.parent.parent / "runs" / "sens-0")
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:200])
    with pytest.raises(BadInput, match="checkpoint cannot be read: .*checkpoint.safetensors.*delete it"):
        train()


def test_an_adapter_that_fits_no_module_is_refused(train):
    with pytest.raises(BadInput, match=r"the adapter fits no module: adapter.targets = \('nonsense',\)"):
        train(adapter={"targets": ("nonsense",)})


def test_a_run_is_done_only_with_its_files_and_inputs(train):
    run = train()
    inputs = run.state["inputs"]
    assert run.is_done(inputs)
    assert not run.is_done("other")
    file = next(run.artefact.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not run.is_done(inputs)
    assert not RunDir(run.path / "nowhere").is_done(inputs)
