"""Every recorded trajectory of the published implementation that follows the paper, to 1e-10."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emomerge.optim as optim
from emomerge.optim.pulse import EmoPulse

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "emo_trajectories.json").read_text())
SHAPES, STEPS, PHASE = (GOLDEN["inputs"][key] for key in ("shapes", "steps", "phase"))


def weights(k: int) -> Tensor:
    i = torch.arange(math.prod(SHAPES[k]), dtype=torch.float64)
    return (0.3 * torch.sin(1.7 * i + 0.9 * k + PHASE) + 0.05 * torch.cos(0.37 * i * (k + 1))).reshape(SHAPES[k])


def gradient(t: int, k: int) -> Tensor:
    i = torch.arange(math.prod(SHAPES[k]), dtype=torch.float64)
    wave = torch.sin(0.71 * t + 1.3 * i + 0.5 * k + PHASE)
    return (wave * (0.2 + torch.cos(0.11 * t * (i + 1) + k).abs()) / (1 + 0.02 * t)).reshape(SHAPES[k])


@pytest.mark.parametrize("preset", ["v3.7", "v3.8", "v3.8-fft", "v3.9"])
def test_pulse(preset: str) -> None:
    pulse = EmoPulse(preset)
    for loss, row in zip(GOLDEN["losses"], GOLDEN["pulse"][preset], strict=True):
        assert pulse.update(loss) == pulse.rate
        figures = [pulse.short, pulse.medium, pulse.long, pulse.noise, pulse.distance, pulse.dnr]
        assert figures == pytest.approx(row[:6], abs=1e-10, rel=0)
        assert pulse.rate == pytest.approx(row[6], abs=1e-18, rel=1e-12)
        assert pulse.should_stop == bool(row[7])


@pytest.mark.parametrize("name", sorted(GOLDEN["optim"]))
def test_optimizer(name: str) -> None:
    rule, preset, *shadow = name.split("/")
    geometry = {"geometry": "l1"} if rule == "EmoVoid" else {}
    params = [torch.nn.Parameter(weights(k)) for k in range(len(SHAPES))]
    opt = getattr(optim, rule)(params, preset=preset, use_shadow=bool(shadow), **geometry)
    recorded = GOLDEN["optim"][name]
    for t in range(1, STEPS + 1):
        for k, p in enumerate(params):
            p.grad = gradient(t, k)
        opt.observe(GOLDEN["losses"][t - 1])
        opt.step()
        assert opt.pulse.rate == pytest.approx(recorded["lr"][t - 1], abs=1e-18, rel=1e-12)
        for p, values in zip(params, recorded["params"].get(str(t), [p.detach().flatten() for p in params]), strict=True):
            wanted = torch.as_tensor(values, dtype=torch.float64)
            torch.testing.assert_close(p.detach().flatten(), wanted, atol=1e-10, rtol=0)


def test_names_every_trajectory_the_rules_share_with_the_paper() -> None:
    wanted = {f"{rule}/{preset}" for rule in ("EmoSens", "EmoAiry", "EmoCats") for preset in ("v3.7", "v3.8", "v3.9")}
    assert set(GOLDEN["optim"]) == wanted | {"EmoSens/v3.8/shadow", "EmoVoid/v3.8"}
