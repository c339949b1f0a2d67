"""The runs of a training seed branch off from the weights of one run, which trained for all of them."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emomerge.checkpoints import model_checkpoint, open_checkpoint
from emomerge.errors import BadInput
from emomerge.numerics.seeds import seed_of
from emomerge.optim import EmoCats, EmoSens
from emomerge.recipe import Full, Lora, Merge, Runs
from emomerge.training import TrainingRun, planned_runs, planned_trunks, run_inputs, train_locally, train_runs, trunk
from emomerge.training.loop import adapted_model, batch_order, micro_batches
from emomerge.training.state import load_state, of_kind

FULL, LORA = Full(kind="full"), Lora(kind="lora", rank=2)


@pytest.fixture
def train(digits, context):
    _, task, _ = digits

    def train(
        folder="runs", on_step=lambda spec, row: None, choose=trunk.last_snapshot, overfits=None, adapter=FULL, **options
    ):
        fields = {"steps": 8, "batch_size": 8, "optimizers": ("sens", "cats"), "rounds": 1, "checkpoint_every": 3, "trunk": 0.5}
        made = context(folder, task=task, runs=Runs(**{**fields, **options}), adapter=adapter, merge=(Merge(method="mean"),))
        train_runs(made, planned_runs(made.recipe), partial(train_locally, made, on_step=on_step), choose, overfits)
        return made

    return train


def hashes(made):
    return [made.run_dir(spec).state["sha256"] for spec in planned_runs(made.recipe)]


@given(steps=st.integers(1, 400), share=st.floats(0, 0.99), count=st.integers(1, 5))
def test_a_trunk_takes_no_steps_beyond_those_of_the_runs(digits, steps, share, count):
    runs = Runs(steps=steps, trunk=share, optimizers=("sens", "airy", "cats", "tion", "void")[:count])
    recipe = digits[0].model_copy(update={"runs": runs})
    trunks, specs = planned_trunks(recipe), planned_runs(recipe)
    assert sum(spec.steps for spec in [*trunks, *specs]) == steps * count
    assert all(spec.steps >= 1 for spec in specs)
    assert len(trunks) == (1 if runs.trunk_steps else 0)
    assert runs.kept_rounds == () or (runs.kept_rounds[0] == 0) == bool(trunks)
    for spec in trunks:
        assert spec.snapshots[-1] == spec.steps
        assert all(1 <= step <= spec.steps for step in spec.snapshots)


def test_trunk_and_runs_match_a_plain_loop(train, digits):
    """The trunk at its full rate on rows of its own; then each run from there, with the cool-down."""
    made = train()
    _, task, data = digits
    runs = made.recipe.runs
    (spec,) = planned_trunks(made.recipe)
    model = adapted_model(made, spec).train()

    def steps(model, spec, optimizer):
        for step in range(spec.steps):
            (micro,) = micro_batches(runs, spec, step)
            torch.manual_seed(seed_of("dropout", 0, micro))
            loss = task.loss(model, data.train.batch(batch_order(runs, spec, len(data.train)).batch(micro)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.damping = 1.0 if spec.is_trunk else min(1.0, (spec.steps - step) / (0.5 * spec.steps))
            optimizer.observe(loss)
            optimizer.step()

    steps(model, spec, EmoSens(model.parameters(), preset="auto"))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for spec, kind in zip(planned_runs(made.recipe), (EmoSens, EmoCats), strict=True):
        model.load_state_dict(start, strict=False)
        steps(model, spec, kind(model.parameters(), preset="auto"))
        written = open_checkpoint(made.run_dir(spec).artefact)
        for name, tensor in model_checkpoint(model, source="plain").items():
            assert torch.equal(written[name], tensor.detach())
    first = [
        batch_order(runs, each, len(data.train)).batch(0) for each in (*planned_trunks(made.recipe), *planned_runs(made.recipe))
    ]
    assert len({tuple(rows.tolist()) for rows in first}) == 3


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_runs_start_from_the_chosen_snapshot(train, adapter):
    asked = []

    def choose(spec):
        asked.append(spec.snapshots)
        return 2

    made = train(adapter=adapter, choose=choose, rounds=2, outer=None)
    (spec,) = planned_trunks(made.recipe)
    assert asked == [(1, 2, 4, 8)]
    start = of_kind(load_state(made.folder / "start-0.safetensors")[1], "model")
    expected = trunk.weights_of(made, spec, made.run_dir(spec).snapshot(2))
    assert start and all(torch.equal(start[name], expected[name]) for name in start)
    assert [folder.name for folder in (made.run_dir(spec).path / "snapshots").iterdir()] == ["step-000002"]
    kept = open_checkpoint(made.folder / "rounds-0/round-0") if adapter is FULL else None
    snapshot = open_checkpoint(made.run_dir(spec).snapshot(2)) if adapter is FULL else None
    assert kept is None or all(torch.equal(kept[name], snapshot[name]) for name in kept)
    assert hashes(train("last", adapter=adapter, rounds=2, outer=None)) != hashes(made)
    assert made.is_done(spec), "its other snapshots are gone, it is not trained again"


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_a_trunk_that_overfits_is_stopped(train, adapter):
    asked, steps = [], []

    def overfits(spec, step):
        asked.append((spec.name, step))
        return step == 4

    def count(spec, row):
        steps.append((spec.name, row["step"]))

    options = {"adapter": adapter, "choose": lambda spec: 2}
    made = train(overfits=overfits, on_step=count, **options)
    (spec,) = planned_trunks(made.recipe)
    assert asked == [("trunk-0", 2), ("trunk-0", 4)]
    assert [step for name, step in steps if name == "trunk-0"] == [1, 2, 3, 4]
    assert made.is_done(spec) and made.run_dir(spec).state["steps_taken"] == 4
    assert hashes(made) == hashes(train("whole", **options)), "the runs start from the same snapshot"
    never = train("never", overfits=lambda spec, step: False, **options)
    assert never.run_dir(spec).state["sha256"] == train("whole", **options).run_dir(spec).state["sha256"]


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": FULL},
        {"adapter": LORA, "parallel": "stacked", "rounds": 2},
        {"adapter": LORA, "overfits": lambda spec, step: step == 4},
    ],
    ids=["full", "lora", "stopped"],
)
def test_killed_again_and_again_they_end_with_the_same_bits(train, monkeypatch, kills, options):
    options = {**options, "choose": lambda spec: spec.snapshots[1]}
    whole = train("whole", **options)
    monkeypatch.setattr(TrainingRun, "finish", kills.around(TrainingRun.finish))
    for name in ("save_state", "weights_of"):
        monkeypatch.setattr(trunk, name, kills.around(getattr(trunk, name)))
    for attempt in range(60):
        kills.left = 4 + attempt % 5
        try:
            made = train("cut", on_step=kills.event, **options)
            break
        except kills.Stop:
            continue
    assert attempt > 2
    assert hashes(made) == hashes(whole)
    steps = []
    train("cut", on_step=lambda spec, row: steps.append(spec), **options)
    assert not steps


def test_a_lost_start_is_made_again_and_a_trunk_of_finished_runs_is_not_needed(train):
    options = {"rounds": 2, "choose": lambda spec: 2}
    made = train(**options)
    before, steps = hashes(made), []

    def count(spec, row):
        steps.append(spec.name)

    (made.folder / "start-0.safetensors").unlink()
    assert hashes(train(**{**options, "choose": None}, on_step=count)) == before
    assert not steps
    for run in planned_runs(made.recipe):
        made.run_dir(run).write_state(state="waiting", inputs=None)
    assert hashes(train(**{**options, "choose": None}, on_step=count)) == before, "one snapshot is left, the chosen one"
    assert set(steps) == {"sens-0", "cats-0"}


def test_a_run_without_its_start_says_so(train, context, digits):
    made = train()
    (made.folder / "start-0.safetensors").unlink()
    spec = planned_runs(made.recipe)[0]
    made.run_dir(spec).write_state(state="waiting", inputs=None)
    with pytest.raises(BadInput, match=r"branch off from are missing: .*start-0\.safetensors"):
        train_locally(made, [spec])


def test_hashes_hold_the_trunk_only_where_it_matters(digits):
    def of(spec_of, **runs):
        recipe = digits[0].model_copy(update={"runs": Runs(rounds=2, **runs)})
        return run_inputs(recipe, spec_of(recipe)[0], "b")

    assert of(planned_runs, trunk=0.5) != of(planned_runs, trunk=0.25) != of(planned_runs, trunk=0)
    assert of(planned_trunks, trunk=0.5) != of(planned_trunks, trunk=0.25)
