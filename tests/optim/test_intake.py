"""Observed and captured losses become one tensor, without a host sync."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emomerge.errors import BadInput, MissingLossError
from emomerge.optim.intake import LossIntake

CPU = torch.device("cpu")
LOSSES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9)


def as_seen(values: list[float], intake: LossIntake, divided: bool) -> float:
    for number, value in enumerate(values):
        intake.observe(torch.tensor([value], dtype=torch.float64) if number % 2 else value, divided=divided)
    return float(intake.take(CPU))


@given(LOSSES)
def test_divided_losses_are_summed_and_others_averaged(values: list[float]) -> None:
    intake, count = LossIntake(), len(values)
    mean = as_seen(values, intake, divided=False)
    assert mean == pytest.approx(math.fsum(values) / count, abs=1e-9)
    assert as_seen([value / count for value in values], intake, divided=True) == pytest.approx(mean, abs=1e-9)


def test_the_mean_is_a_double_on_the_device_asked_for() -> None:
    intake = LossIntake()
    for loss in (torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(1 / 3, dtype=torch.float64), 1 / 3):
        intake.observe(loss)
        mean = intake.take(CPU)
        assert (mean.dtype, mean.shape, mean.device) == (torch.float64, torch.Size(), CPU)
        assert float(mean) == float(loss)


@pytest.mark.parametrize("first", [False, True])
def test_one_step_does_not_mix_divided_and_undivided_losses(first: bool) -> None:
    intake = LossIntake()
    intake.observe(1.0, divided=first)
    with pytest.raises(BadInput, match="same value for every micro-batch"):
        intake.observe(2.0, divided=not first)
    intake.observe(3.0, divided=first)
    assert float(intake.take(CPU)) == (4.0 if first else 2.0)
    intake.observe(5.0, divided=not first)  # another step
    assert float(intake.take(CPU)) == 5.0


def test_captured_losses_are_summed_unless_one_is_observed() -> None:
    intake = LossIntake()
    for value in (1.0, 2.0):
        intake.capture(torch.tensor(value))
    assert float(intake.take(CPU)) == 3.0
    intake.capture(torch.tensor(7.0))
    intake.observe(4.0)
    intake.observe(6.0)
    assert float(intake.take(CPU)) == 5.0
    with pytest.raises(MissingLossError):  # what was captured beside them is gone
        intake.take(CPU)


def test_forgetting() -> None:
    intake = LossIntake()
    intake.capture(torch.tensor(1.0))
    intake.forget_captured()
    with pytest.raises(MissingLossError):
        intake.take(CPU)
    intake.observe(2.0)
    intake.forget_captured()
    assert float(intake.take(CPU)) == 2.0
    intake.observe(2.0)
    intake.capture(torch.tensor(1.0))
    intake.forget()
    with pytest.raises(MissingLossError):
        intake.take(CPU)


def test_a_missing_loss_is_told_every_way_to_give_one() -> None:
    with pytest.raises(MissingLossError, match=r"observe\(loss\).*closure.*EmoTrainer.*capture_loss=True"):
        LossIntake().take(CPU)


def test_what_is_kept_is_a_detached_copy() -> None:
    intake = LossIntake()
    loss = torch.tensor(2.0, requires_grad=True) * 1
    intake.observe(loss)
    intake.capture(loss)
    with torch.no_grad():
        loss /= 4
    for kept in (intake._observed[0].value, *intake._captured):
        assert isinstance(kept, Tensor) and not kept.requires_grad
        assert kept.item() == 2.0


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("loss", [torch.empty((), device="meta"), 1.0])
def test_nothing_waits_for_the_device(loss: Tensor | float, divided: bool) -> None:
    intake = LossIntake()
    for _ in range(3):
        intake.observe(loss, divided)
        if isinstance(loss, Tensor):
            intake.capture(loss)
    assert intake.take(torch.device("meta")).is_meta  # a meta tensor has no value to wait for: asking for it is an error


@pytest.mark.parametrize("loss", [torch.ones(3), torch.tensor(1 + 1j), torch.ones(0)])
def test_a_loss_is_one_real_number(loss: Tensor) -> None:
    for note in (LossIntake().observe, LossIntake().capture):
        with pytest.raises(BadInput, match="one real number"):
            note(loss)


def test_losses_in_host_memory_stay_there_on_request() -> None:
    intake, device = LossIntake(), torch.device("meta")
    for losses in ([0.5], [torch.tensor(0.5)], [torch.tensor(0.25), 0.75]):
        for loss in losses:
            intake.observe(loss)
        assert intake.take(device, host=True).item() == 0.5
    intake.observe(0.5)
    assert intake.take(device).is_meta
    intake.observe(torch.zeros((), device="meta"))
    assert intake.take(device, host=True).is_meta
