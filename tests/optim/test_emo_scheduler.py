"""EmoPulseLR on a torch optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from emomerge.errors import BadInput, MissingLossError, NonFiniteLossError
from emomerge.optim import EmoPulse, EmoPulseLR, EmoSens


def adamw() -> torch.optim.AdamW:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    return torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 0.1}])


def test_writes_the_pulse_to_every_group() -> None:
    opt = adamw()
    scheduler, pulse = EmoPulseLR(opt, preset="v3.9", scope=2.0), EmoPulse("v3.9", 2.0)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert scheduler.get_last_lr() == [2e-4, 2e-4]
    for step in range(30):
        loss = 1 / (1 + step)
        scheduler.step(torch.tensor(loss, dtype=torch.float64))
        rate = pulse.update(loss)
        assert [group["lr"] for group in opt.param_groups] == [rate, rate] == scheduler.get_last_lr()
        opt.step()
    assert scheduler.pulse == pulse


def test_averages_micro_batches() -> None:
    scheduler = EmoPulseLR(adamw())
    scheduler.observe(1.0)
    scheduler.observe(torch.tensor(3.0))
    scheduler.step()
    assert scheduler.pulse.short == 2.0
    with pytest.raises(MissingLossError):
        scheduler.step()


def test_divided_micro_batches_are_summed() -> None:
    scheduler = EmoPulseLR(adamw())
    scheduler.observe(torch.tensor(0.5), divided=True)
    scheduler.observe(1.5, divided=True)
    scheduler.step()
    assert scheduler.pulse.short == 2.0 and isinstance(scheduler.pulse.short, float)


def test_resumes_bit_identically() -> None:
    losses = [1 + math.sin(step) for step in range(20)]
    whole, first, second = (EmoPulseLR(adamw()) for _ in range(3))
    for step, loss in enumerate(losses):
        whole.step(loss)
        if step == 7:
            second.load_state_dict(first.state_dict())
        (first if step < 7 else second).step(loss)
    assert second.state_dict() == whole.state_dict()
    assert second.get_last_lr() == whole.get_last_lr()


def test_non_finite_loss_keeps_the_rate() -> None:
    opt = adamw()
    scheduler = EmoPulseLR(opt)
    scheduler.step(1.0)
    before = scheduler.state_dict(), scheduler.get_last_lr()
    with pytest.raises(NonFiniteLossError):
        scheduler.step(math.nan)
    assert (scheduler.state_dict(), scheduler.get_last_lr()) == before


def test_tensor_rates_stay_tensors() -> None:
    lr = torch.tensor(1e-3)
    opt = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=lr)
    EmoPulseLR(opt).step(1.0)
    assert opt.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(1e-4)


def test_emo_optimizers_are_refused() -> None:
    with pytest.raises(BadInput, match="EmoSens; use its own `pulse`"):
        EmoPulseLR(EmoSens([nn.Parameter(torch.ones(2))]))
