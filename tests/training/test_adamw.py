import math

import pytest
import torch
from torch import nn

from emomerge.errors import NonFiniteLossError
from emomerge.training.adamw import AdamWCosine


def test_it_is_adamw_under_torchs_cosine_schedule():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    rival = AdamWCosine([ours], lr=0.1, steps=7, weight_decay=0.2)
    adamw = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 7)
    for _ in range(7):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        rate = adamw.param_groups[0]["lr"]
        rival.observe(torch.tensor(1.0))
        rival.step()
        adamw.step()
        schedule.step()
        assert rival.pulse.figures()["rate"] == pytest.approx(rate, rel=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_loss_that_is_not_finite_leaves_everything():
    weight = nn.Parameter(torch.ones(2))
    rival = AdamWCosine([weight], lr=0.1, steps=3)
    weight.grad = torch.ones(2)
    for loss in (math.nan, math.inf):
        rival.observe(torch.tensor(loss))
        with pytest.raises(NonFiniteLossError):
            rival.step()
    assert weight.tolist() == [1, 1]
    assert not rival.state
    rival.observe(torch.tensor(1.0))
    rival.step()
    assert rival.param_groups[0]["taken"] == 1
