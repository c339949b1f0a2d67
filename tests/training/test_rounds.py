import shutil
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from emomerge.checkpoints import model_checkpoint, open_checkpoint
from emomerge.errors import BadInput, RunFailed
from emomerge.numerics.hashing import sha256
from emomerge.numerics.seeds import seed_of
from emomerge.optim import OPTIMIZERS
from emomerge.recipe import Full, Merge, Outer, Runs
from emomerge.training import (
    KeptRounds,
    Loaded,
    RunDir,
    RunSpec,
    TrainingRun,
    planned_runs,
    rounds,
    run_inputs,
    train_locally,
    train_runs,
)
from emomerge.training.loop import adapted_model, batch_order, micro_batches
from emomerge.training.plan import round_ends
from emomerge.training.rounds import nesterov
from emomerge.training.run import copy_into
from emomerge.training.state import load_state, of_kind

CPU = torch.device("cpu")


class Stop(Exception):
    """Stands for a kill: nothing of the runs survives it but their files."""


@pytest.fixture
def train(digits, context):
    recipe, task, _ = digits

    def train(
        folder="runs", on_step=lambda spec, row: None, task=task, adapter=recipe.adapter, of="runs", loaded=None, **options
    ):
        runs = Runs(
            **{
                "procedure": "paper",
                "preset": "guarded",
                "steps": 12,
                "batch_size": 8,
                "optimizers": ("sens", "cats", "void"),
                "lr": 20.0,
                **options,
            }
        )
        made = context(folder, task=task, runs=runs, adapter=adapter, merge=(Merge(method="mean", of=of),))
        specs = planned_runs(made.recipe)
        train_runs(made, specs, partial(train_locally, made, on_step=on_step, loaded=loaded))
        return [made.run_dir(spec) for spec in specs]

    return train


def hashes(runs):
    return [run.state["sha256"] for run in runs]


def kept(runs, seed=0):
    """Return the hash of every file of the kept rounds, by path."""
    folder = runs[0].path.parent / f"rounds-{seed}"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file) for file in files}


@given(steps=st.integers(1, 1000), rounds=st.integers(1, 60))
def test_rounds_share_the_steps_evenly(steps, rounds):
    rounds = min(rounds, steps)
    ends = round_ends(Runs(steps=steps, rounds=rounds, trunk=0))
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    assert len(lengths) == rounds
    assert ends[-1] == steps
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


@pytest.mark.parametrize("outer", [None, Outer(momentum=0.5, lr=0.8)])
def test_rounds_match_a_plain_loop(train, digits, context, outer):
    """Against the plainest loop: all models in memory, torch's SGD between the rounds."""
    runs = train(adapter=Full(kind="full"), rounds=3, outer=outer)
    recipe, task, data = digits
    plain = context(adapter=Full(kind="full"), runs=Runs(procedure="paper", batch_size=8))
    recipe = plain.recipe
    specs = [RunSpec(name, name, 0, 12) for name in ("sens", "cats", "void")]
    models = [adapted_model(plain, spec).train() for spec in specs]
    meeting = [p.detach().clone().requires_grad_(True) for p in models[0].parameters()]
    sgd = torch.optim.SGD(meeting, lr=outer.lr, momentum=outer.momentum, nesterov=True) if outer else None
    optimizers = [
        OPTIMIZERS[s.optimizer].load()(m.parameters(), lr=20.0, preset="guarded") for s, m in zip(specs, models, strict=True)
    ]
    for begin in (0, 4, 8):
        for spec, model, optimizer in zip(specs, models, optimizers, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), meeting)
            for step in range(begin, begin + 4):
                (micro,) = micro_batches(recipe.runs, specs[0], step)
                torch.manual_seed(seed_of("dropout", 0, micro))
                rows = batch_order(recipe.runs, spec, len(data.train)).batch(micro)
                loss = task.loss(model, data.train.batch(rows))
                optimizer.zero_grad()
                loss.backward()
                optimizer.observe(loss)
                optimizer.step()
        means = [(a + b + c) / 3 for a, b, c in zip(*(m.parameters() for m in models), strict=True)]
        if sgd is not None:
            for start, mean in zip(meeting, means, strict=True):
                start.grad = (start - mean).detach()
            sgd.step()
        else:
            meeting = [mean.detach() for mean in means]
    for run, model in zip(runs, models, strict=True):
        written = open_checkpoint(run.artefact)
        for name, tensor in model_checkpoint(model, source="plain").items():
            assert torch.equal(written[name], tensor.detach())
        assert [row["step"] for row in run.metrics()] == list(range(1, 13))


@pytest.mark.parametrize("changes", [{"parallel": "sequential"}, {"parallel": "stacked"}, {"adapter": Full(kind="full")}])
def test_models_that_stay_loaded_save_time_and_nothing_else(train, digits, monkeypatch, changes):
    _, task, _ = digits
    counts = {}
    for kept in (None, Loaded()):
        reloads, reload_model = [], task.reload_model
        with monkeypatch.context() as patch:
            patch.setattr(task, "reload_model", lambda *a, **k: reloads.append(0) or reload_model(*a, **k))  # noqa: B023
            found = hashes(train(f"loaded {kept is not None}", rounds=4, outer=Outer(momentum=0.5), loaded=kept, **changes))
        counts[kept is not None] = len(reloads), found
    (with_reloads, without), (with_loaded, same) = counts[False], counts[True]
    assert same == without
    assert with_reloads - with_loaded == 3  # one for each round after the first


def test_one_round_is_none(train):
    options = {"optimizers": ("sens", "cats"), "steps": 4}
    assert hashes(train("a", **options)) == hashes(train("b", rounds=1, **options)) != hashes(train("c", rounds=2, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": "sequential"},
        {"parallel": "stacked"},
        {"parallel": "sequential", "adapter": Full(kind="full"), "seeds": (0, 1), "keep_rounds": 3},
    ],
    ids=["sequential", "stacked", "full-two-seeds"],
)
def test_killed_again_and_again_in_every_round_they_end_with_the_same_bits(train, monkeypatch, kills, changes):
    """Killed after steps, before and after files are written, between the runs of a round, before and after a meeting."""
    options = {"rounds": 6, "outer": Outer(), "average": "lawa", "checkpoint_every": 2, "optimizers": ("sens", "cats")}
    options |= changes
    whole = train("whole", **options)
    killed = set()
    watched = kills.around(rounds.save_state)
    for module in ("run_dir", "rounds"):
        monkeypatch.setattr(f"emomerge.training.{module}.save_state", watched)
    monkeypatch.setattr(TrainingRun, "finish", kills.around(TrainingRun.finish))
    monkeypatch.setattr(KeptRounds, "keep", kills.around(KeptRounds.keep))
    for name in ("save_adapted", "write_mean"):
        monkeypatch.setattr(rounds, name, kills.around(getattr(rounds, name)))
    for attempt in range(100):
        kills.left = 6 + attempt % 5
        try:
            runs = train("cut", on_step=kills.event, **options)
            break
        except kills.Stop:
            killed.add((kills.step - 1) // 2)
    assert hashes(runs) == hashes(whole)
    for seed in changes.get("seeds", (0,)):
        assert len(kept(whole, seed)) > 3
        assert kept(runs, seed) == kept(whole, seed)
    assert killed == set(range(6))
    for run, undisturbed in zip(runs, whole, strict=True):
        assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in undisturbed.metrics()]
    left_over = [*runs[0].path.parent.rglob("*checkpoint*"), *runs[0].path.parent.glob("meeting*")]
    assert not left_over


def test_what_no_longer_fits_together_is_trained_again(train):
    options = {"rounds": 3, "checkpoint_every": 2, "optimizers": ("sens", "cats"), "steps": 6}
    whole = train("whole", **options)

    def stop(spec, row):
        if spec.name == "cats-0" and row["step"] == 4:
            raise Stop

    with pytest.raises(Stop):
        train("cut", on_step=stop, **options)
    cut = whole[0].path.parent.parent / "cut"
    for lost in ("meeting-0.safetensors", "cats-0/checkpoint.safetensors", "sens-0"):
        copy = cut.parent / "copy"
        shutil.copytree(cut, copy)
        shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
        assert hashes(train("copy", **options)) == hashes(whole)
        shutil.rmtree(copy)

    steps = []
    train("whole", on_step=lambda spec, row: steps.append(spec.name), **options)
    assert not steps
    before = hashes(whole)
    shutil.rmtree(whole[1].artefact)
    assert hashes(train("whole", on_step=lambda spec, row: steps.append(spec.name), **options)) == before
    assert len(steps) == 12  # the others' optimizers of the round before are gone


def test_a_damaged_meeting_is_named(train, tmp_path):
    def stop(spec, row):
        if row["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(on_step=stop, rounds=3)
    (tmp_path / "runs/meeting-0.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match=r"checkpoint cannot be read: .*meeting-0\.safetensors.*delete it"):
        train(rounds=3)


class Poisoned:
    """A task whose loss is NaN once, after so many good ones."""

    def __init__(self, task, good):
        self._task, self._good = task, good

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        self._good -= 1
        return self._task.loss(model, batch) * (float("nan") if self._good == -1 else 1.0)


def test_a_run_that_fails_ends_the_rounds_of_its_seed_only(train, digits):
    options = {"rounds": 3, "seeds": (0, 1), "optimizers": ("sens", "cats"), "steps": 6, "parallel": "sequential"}
    with pytest.raises(RunFailed, match="run cats-0 failed.* at step 4"):
        train(task=Poisoned(digits[1], 4 * 2 + 2 + 1), **options)
    runs = {run.path.name: run for run in train("whole", **options)}
    states = {name: RunDir(run.path.parent.parent / "runs" / name).state for name, run in runs.items()}
    assert {name: state["state"] for name, state in states.items()} == {
        "sens-0": "waiting", "cats-0": "failed", "sens-1": "done", "cats-1": "done",
    }  # fmt: skip
    healthy = {run.path.name: run for run in train(**options)}
    assert {name: run.state["sha256"] for name, run in healthy.items()} == {n: run.state["sha256"] for n, run in runs.items()}


def test_lora_factors_are_averaged_each_for_itself(train, tmp_path):
    """The first step of the second round is taken from the means of A and of B."""
    options = {"optimizers": ("sens", "cats"), "rounds": 2, "steps": 2, "checkpoint_every": 1}
    found = {}

    def look(spec, row):
        if row["step"] == 2 and not found:
            ends = [load_state(tmp_path / "runs" / name / "checkpoint.safetensors")[1] for name in ("sens-0", "cats-0")]
            found["ends"] = [of_kind(end, "model") for end in ends]
            found["start"] = of_kind(load_state(tmp_path / "runs/meeting-0.safetensors")[1], "model")

    train(on_step=look, **options)
    sens, cats = found["ends"]
    assert set(found["start"]) == set(sens)
    assert any("lora_A" in name for name in sens)
    for name, start in found["start"].items():
        assert torch.equal(start, (sens[name] + cats[name]) / 2)
        assert not torch.equal(sens[name], cats[name])


@given(momentum=st.floats(0, 0.99), lr=st.floats(0.1, 2), seed=st.integers(0, 9))
def test_outer_steps_are_those_of_sgd_with_nesterov(momentum, lr, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(5)]
    parameter = draws[0].clone().requires_grad_(True)
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=momentum > 0)
    theta, velocity = draws[0], None
    for step in draws[1:]:
        mean = theta + step
        parameter.grad = (parameter - mean).detach()
        sgd.step()
        theta, velocity = nesterov(theta, mean, velocity, Outer(momentum=momentum, lr=lr))
        torch.testing.assert_close(theta, parameter.detach())


def test_the_hash_of_a_run_holds_what_decides_it(digits):
    recipe = digits[0]

    def of(name, control=None, **runs):
        spec = RunSpec(name, name, 0, 300, control=control)
        runs = {"procedure": "paper", "preset": "guarded", **runs}
        return run_inputs(recipe.model_copy(update={"runs": Runs(**runs)}), spec, "b")

    plain = of("sens")
    assert plain == of("sens", average="none", rounds=1, keep_rounds=3, lr={"sens": 1.0, "cats": 7.0})
    changes = [{"lr": {"sens": 2.0}}, {"average": "ema"}, {"average": "lawa"}, {"cooldown": 0.5}, {"early_stop": True}]
    changes += [{"rounds": 2}, {"rounds": 3}, {"rounds": 3, "outer": {}}, {"rounds": 3, "lr": {"cats": 7.0}}]
    changes += [{"rounds": 3, "optimizers": ("sens", "cats")}]
    assert len({plain, *(of("sens", **change) for change in changes)}) == 1 + len(changes)
    assert of("sens", "long-run", rounds=3, outer={}, early_stop=True) == of("sens", "long-run")  # controls have none of these
    assert of("sens", "long-run", cooldown=0.5) != of("sens", "long-run")


# ------------------------------------------------------------------------------------------------------- kept rounds


@given(rounds=st.integers(1, 60), keep=st.integers(0, 60))
def test_kept_rounds_are_evenly_spaced_and_end_with_the_last(rounds, keep):
    kept = Runs(steps=60, rounds=rounds, keep_rounds=keep, trunk=0).kept_rounds
    assert len(kept) == (0 if rounds == 1 else min(keep, rounds))
    gaps = [late - early for early, late in zip((0, *kept), kept, strict=False)]
    assert not kept or (kept[-1] == rounds and max(gaps) - min(gaps) <= 1 and min(gaps) >= 1)


@pytest.mark.parametrize("adapter", [None, Full(kind="full")], ids=["lora", "full"])
def test_a_kept_round_is_the_plain_mean_of_the_runs(train, digits, context, adapter, tmp_path):
    """Against the runs' checkpoints at the end of the round, and for the last round against their results."""
    ends = {}

    def look(spec, row):
        if spec.name == "sens-0" and row["step"] == 5:  # every run waits at the end of round 2
            for name in ("sens-0", "cats-0"):
                shutil.copyfile(tmp_path / "runs" / name / "checkpoint.safetensors", tmp_path / name)
                ends[name] = of_kind(load_state(tmp_path / name)[1], "model")

    options = {"optimizers": ("sens", "cats"), "rounds": 3, "keep_rounds": 3, "steps": 6, "outer": Outer(momentum=0.5)}
    options |= {"adapter": adapter or digits[0].adapter, "parallel": "sequential"}
    runs = train(on_step=look, **options)
    folder = tmp_path / "runs/rounds-0"
    assert {f.name for f in folder.iterdir()} == {"rounds.json", "round-1", "round-2", "round-3"}
    mean = {name: (tensor + ends["cats-0"][name]) / 2 for name, tensor in ends["sens-0"].items()}
    if adapter:
        model = adapted_model(context(adapter=adapter), RunSpec("sens", "sens", 0, 6))
        copy_into(model, mean)
        expected, written = model_checkpoint(model, source="mean"), open_checkpoint(folder / "round-2")
    else:
        expected = {name.replace(".default.", "."): tensor for name, tensor in mean.items()}
        written = load_file(folder / "round-2/adapter_model.safetensors")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    file = next(runs[0].artefact.glob("*.safetensors")).name
    last, one, other = (load_file(f / file) for f in (folder / "round-3", runs[0].artefact, runs[1].artefact))
    assert last.keys() == one.keys()
    for name, tensor in last.items():
        assert torch.equal(tensor, (one[name] + other[name]) / 2)
    assert {f.name for f in (folder / "round-3").iterdir()} == {f.name for f in runs[0].artefact.iterdir()}


@pytest.mark.parametrize("parallel", ["sequential", "stacked"])
def test_keeping_rounds_changes_no_run(train, parallel):
    options = {"rounds": 4, "outer": Outer(), "optimizers": ("sens", "cats"), "seeds": (0, 1), "parallel": parallel}
    without = train("without", keep_rounds=0, **options)
    runs = train("with", keep_rounds=2, **options)
    assert hashes(runs) == hashes(without)
    assert [run.state["inputs"] for run in runs] == [run.state["inputs"] for run in without]
    assert not kept(without)
    for seed in (0, 1):
        assert {path.partition("/")[0] for path in kept(runs, seed)} == {"rounds.json", "round-2", "round-4"}
    assert kept(runs, 0)["round-2/adapter_model.safetensors"] != kept(runs, 1)["round-2/adapter_model.safetensors"]


def test_missing_rounds_are_made_again_if_a_merge_needs_them(train):
    options = {"rounds": 3, "optimizers": ("sens", "cats"), "steps": 6, "parallel": "sequential"}
    whole = train(**options)
    first, results = kept(whole), hashes(whole)
    assert {path.partition("/")[0] for path in first} == {"rounds.json", "round-1", "round-2", "round-3"}
    folder, steps = whole[0].path.parent / "rounds-0", []

    def again(**changes):
        steps.clear()
        train(on_step=lambda spec, row: steps.append(spec.name), **options | changes)
        return len(steps)

    shutil.rmtree(folder / "round-3")
    assert again(of="rounds") == 0  # the mean of the finished runs
    assert kept(whole) == first
    (folder / "round-1/adapter_model.safetensors").write_bytes(b"cut")
    assert again() == 0  # no merge needs it
    assert again(of="rounds") == 12
    assert kept(whole) == first
    assert hashes(whole) == results
    shutil.rmtree(folder)
    assert again(of="rounds") == 12
    assert again(of="rounds", keep_rounds=2) == 0
    assert again(of="rounds", lr=10.0) == 12
    assert {name for name in kept(whole) if kept(whole)[name] == first.get(name)} == {
        f"round-{number}/adapter_config.json" for number in (1, 2, 3)
    }
