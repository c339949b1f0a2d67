"""Runs that end early where they overfit, alone and beside runs that take all their steps."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from emomerge.errors import RunFailed
from emomerge.recipe import Full, Lora, Runs
from emomerge.training import RunSpec, TrainingRun, train_locally, train_runs
from emomerge.training.early_ends import checks, train_until_overfitted

EARLY = RunSpec("long-sens-0", "sens", 0, 12, control="long-run", snapshots=(2, 4, 6, 8, 10), ends_early=True)
WHOLE = RunSpec("long-adamw-0", "adamw", 0, 12, control="adamw-long-run", rate=1e-3)
ADAPTERS = pytest.mark.parametrize("adapter", [Full(kind="full"), Lora(kind="lora", rank=2)], ids=["full", "lora"])


@pytest.fixture
def train(digits, context):
    _, task, _ = digits

    def train(folder="runs", specs=(EARLY, WHOLE), overfits=None, on_step=lambda spec, row: None, adapter=None, **options):
        runs = Runs(steps=4, batch_size=8, checkpoint_every=3, **options)
        made = context(folder, task=task, runs=runs, adapter=adapter or Lora(kind="lora", rank=2))
        train_runs(made, specs, partial(train_locally, made, on_step=on_step), overfits=overfits)
        return made

    return train


def state(made, spec):
    return made.run_dir(spec).state


def test_runs_are_looked_at_from_a_quarter_of_their_steps_on():
    assert checks(EARLY) == [4, 6, 8, 10, 12]
    assert checks(replace(EARLY, snapshots=(1,))) == [12]


@ADAPTERS
def test_a_run_that_overfits_ends_there_and_the_others_go_on(train, adapter):
    asked, steps = [], []

    def overfits(spec, step):
        asked.append((spec.name, step))
        return step == 6

    made = train(overfits=overfits, on_step=lambda spec, row: steps.append((spec.name, row["step"])), adapter=adapter)
    assert asked == [("long-sens-0", 4), ("long-sens-0", 6)]
    assert [step for name, step in steps if name == EARLY.name] == [*range(1, 7)]
    assert [step for name, step in steps if name == WHOLE.name] == [*range(1, 13)]
    assert made.is_done(EARLY) and state(made, EARLY)["steps_taken"] == 6
    assert made.is_done(WHOLE) and state(made, WHOLE)["steps_taken"] == 12
    assert [step for step in EARLY.snapshots if made.run_dir(EARLY).snapshot(step).is_dir()] == [2, 4, 6]
    steps.clear()
    train(overfits=overfits, on_step=lambda spec, row: steps.append(spec), adapter=adapter)
    assert not steps, "nothing to do"


@ADAPTERS
def test_one_that_never_overfits_has_the_bits_of_one_that_nobody_looks_at(train, adapter):
    looked_at = train("looked-at", overfits=lambda spec, step: False, adapter=adapter)
    alone = train("alone", adapter=adapter)
    for spec in (EARLY, WHOLE):
        assert state(looked_at, spec)["sha256"] == state(alone, spec)["sha256"]
        assert state(looked_at, spec)["steps_taken"] == 12


def test_without_a_run_that_may_end_early_nobody_is_asked(train):
    def overfits(spec, step):
        raise AssertionError("asked")

    made = train(specs=[WHOLE], overfits=overfits)
    assert made.is_done(WHOLE)


def test_a_run_that_diverges_does_not_keep_the_others_from_their_ends(context):
    made, trained = context(), []

    def execute(pieces):
        for piece in pieces:
            if piece.name == WHOLE.name and piece.end == 6:
                continue
            run = made.run_dir(piece)
            run.path.mkdir(parents=True, exist_ok=True)
            header = {"inputs": made.run_inputs(piece), "step": piece.end}
            run.save_checkpoint({"model.w": torch.zeros(1)}, header)
            run.write_state(state="waiting", **header)
            trained.append((piece.name, piece.start, piece.end))
        if any(piece.name == WHOLE.name and piece.end == 6 for piece in pieces):
            raise RunFailed("run long-adamw-0 failed at step 5")

    with pytest.raises(RunFailed, match="at step 5"):
        train_until_overfitted(made, [EARLY, WHOLE], execute, lambda spec, step: False)
    assert [piece[1:] for piece in trained if piece[0] == EARLY.name] == [(0, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    assert [piece[1:] for piece in trained if piece[0] == WHOLE.name] == [(0, 4)]


@ADAPTERS
def test_killed_again_and_again_they_end_with_the_same_bits(train, monkeypatch, kills, adapter):
    def overfits(spec, step):
        kills.event()
        return step == 8

    kills.left = 10**6
    whole = train("whole", overfits=overfits, adapter=adapter)
    monkeypatch.setattr(TrainingRun, "finish", kills.around(TrainingRun.finish))
    monkeypatch.setattr(TrainingRun, "keep_snapshot", kills.around(TrainingRun.keep_snapshot))
    for attempt in range(80):
        kills.left = 16 + attempt % 7
        try:
            made = train("cut", overfits=overfits, on_step=kills.event, adapter=adapter)
            break
        except kills.Stop:
            continue
    assert attempt > 2
    assert [state(made, spec)["sha256"] for spec in (EARLY, WHOLE)] == [state(whole, spec)["sha256"] for spec in (EARLY, WHOLE)]
    assert state(made, EARLY)["steps_taken"] == 8


@ADAPTERS
def test_a_kill_before_a_snapshot_is_written_does_not_lose_it(train, monkeypatch, kills, tmp_path, adapter):
    keep = TrainingRun.keep_snapshot

    def killed_at_six(self, model):
        if self.spec.name == EARLY.name and self.step == 6:
            raise kills.Stop
        keep(self, model)

    snapshot = tmp_path / "runs" / EARLY.name / "snapshots/step-000006"
    monkeypatch.setattr(TrainingRun, "keep_snapshot", killed_at_six)
    with pytest.raises(kills.Stop):
        train(overfits=lambda spec, step: False, adapter=adapter)
    assert not snapshot.exists()
    monkeypatch.undo()
    made = train(overfits=lambda spec, step: step == 6 and snapshot.is_dir(), adapter=adapter)
    assert state(made, EARLY)["steps_taken"] == 6
