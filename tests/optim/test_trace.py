"""The record of a pulse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.optim import EmoSens, PulseTrace


def test_records_what_the_pulse_did(tmp_path: Path) -> None:
    w = nn.Parameter(torch.ones(3))
    opt = EmoSens([w])
    rates = []
    with PulseTrace(opt) as trace:
        for step in range(5):
            w.grad = torch.ones(3)
            opt.observe(1.0 / (step + 1))
            opt.step()
            rates.append(opt.pulse.rate)
        opt.param_groups[0]["lr"] = 0.0
        opt.step()  # the pulse stands still
        opt.param_groups[0]["lr"] = 1.0
    opt.observe(1.0)
    opt.step()  # no longer recorded
    assert [row["step"] for row in trace.rows] == [1, 2, 3, 4, 5]
    assert [row["rate"] for row in trace.rows] == rates
    assert [row["loss"] for row in trace.rows] == [1.0 / (step + 1) for step in range(5)]
    trace.save(tmp_path / "pulse.jsonl")
    assert [json.loads(line) for line in (tmp_path / "pulse.jsonl").read_text().splitlines()] == trace.rows


def test_steps_that_leave_the_pulse_alone_are_not_recorded() -> None:
    opt = EmoSens([nn.Parameter(torch.ones(3))], lr=0.0)
    with PulseTrace(opt) as trace:
        opt.step()
    assert trace.rows == []


def test_purity_is_the_cube_of_the_ratio_whose_square_is_dnr() -> None:
    opt = EmoSens([nn.Parameter(torch.ones(1))])
    for loss in (1.0, 0.7, 0.4, 0.3):
        opt.pulse.update(loss)
    assert opt.pulse.purity == pytest.approx(opt.pulse.dnr_now**1.5) and opt.pulse.purity > 0
