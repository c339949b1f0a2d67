"""`geometry="l1"` across versions: states saved when one base class held both geometries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.optim import OPTIMIZERS

SAVED = json.loads((Path(__file__).parents[1] / "data" / "l1_states.json").read_text())


@pytest.mark.parametrize("name", ["tion", "void"])
def test_a_state_of_an_earlier_version_continues_with_the_same_bits(path: str, name: str) -> None:
    """Saved after 5 steps of lr=30 and the loss 1/(1 + t); `later` is where that version went in 5 more."""
    saved = SAVED[name]
    w = nn.Parameter(torch.tensor(saved["weights"], dtype=torch.float64))
    state = {int(k): {n: torch.tensor(v, dtype=torch.float64) for n, v in s.items()} for k, s in saved["state"].items()}
    opt = OPTIMIZERS[name].load()([w], lr=30.0)
    opt.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    assert opt.param_groups[0]["geometry"] == "l1"
    for t in range(5, 10):
        w.grad = torch.sin(torch.arange(3, dtype=torch.float64) + t)
        opt.observe(1 / (1 + t))
        opt.step()
    assert w.tolist() == pytest.approx(saved["later"], rel=1e-14, abs=0)
