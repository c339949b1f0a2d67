"""The pulse on the device: the same figures without a host sync, captured and compiled."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, MissingLossError
from emomerge.optim import OPTIMIZERS, EmoSens
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.pulse import PRESETS

RULES = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in ((4, 3), (5,), ())
    ]


def train(opt: EmoOptimizer, start: int, stop: int) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        loss = 1 / (1 + 0.1 * step) + (3.0 if step % 7 == 5 else 0.0)
        opt.observe(torch.tensor(loss, dtype=torch.float64))
        opt.step()


def close(one: EmoOptimizer, other: EmoOptimizer, tolerance: float) -> None:
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=tolerance, rtol=tolerance)
    figures, others = one.pulse.state_dict(), other.pulse.state_dict()
    assert figures.pop("preset") == others.pop("preset")
    assert figures == pytest.approx(others, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
@RULES
def test_is_the_pulse_of_the_host(name: str, preset: str) -> None:
    host = OPTIMIZERS[name].load()(parameters(), preset=preset, lr=3.0, maximize=True)
    device = OPTIMIZERS[name].load()(parameters(), preset=preset, lr=3.0, maximize=True, capturable=True)
    for opt in (host, device):
        train(opt, 0, 120)
    close(device, host, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@RULES
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    host, device = (OPTIMIZERS[name].load()(parameters(dtype), lr=3.0, capturable=on) for on in (False, True))
    for opt in (host, device):
        train(opt, 0, 20)
    close(device, host, 1e-6 if dtype == torch.float32 else 2e-2)


@RULES
def test_waits_for_nothing(name: str) -> None:
    """Meta tensors hold no data: whatever asked for a value would fail."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (5,))]
    opt = OPTIMIZERS[name].load()(params, capturable=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        opt.observe(torch.empty((), device="meta"))
        opt.step()


@RULES
def test_compiles_whole(name: str) -> None:
    plain, compiled = (OPTIMIZERS[name].load()(parameters(torch.float32), capturable=True) for _ in range(2))
    for opt in (plain, compiled):
        train(opt, 0, 2)  # the state is there before the step is traced

    @torch.compile(backend="eager", fullgraph=True)
    def step(loss: Tensor) -> None:
        compiled.observe(loss)
        compiled.step()

    for opt, advance in ((plain, None), (compiled, step)):
        for number in range(3):
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.full_like(p, number - 1.5)
            loss = torch.tensor(0.5 / (number + 1))
            if advance is None:
                opt.observe(loss)
                opt.step()
            else:
                advance(loss)
    close(compiled, plain, 1e-6)


@RULES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_no_weight(name: str, bad: float) -> None:
    opt = OPTIMIZERS[name].load()(parameters(), capturable=True)
    train(opt, 0, 5)
    weights, pulse = copy.deepcopy(opt.param_groups[0]["params"]), opt.pulse.state_dict()
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.full_like(p, math.nan)
    opt.observe(torch.tensor(bad))
    opt.step()
    assert opt.pulse.state_dict() == pulse
    assert all(torch.equal(p, q) for p, q in zip(opt.param_groups[0]["params"], weights, strict=True))
    train(opt, 5, 7)
    assert opt.pulse.steps == 7 and all(p.isfinite().all() for p in opt.param_groups[0]["params"])
    with pytest.raises(MissingLossError):
        opt.step()


@RULES
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_resumes_and_copies(name: str, clone: Callable[[Any], Any]) -> None:
    opt = OPTIMIZERS[name].load()(parameters(), capturable=True, preset="v3.9")
    train(opt, 0, 9)
    twin = clone(opt)
    params = [nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]]
    resumed = OPTIMIZERS[name].load()(params, capturable=True)
    resumed.load_state_dict(opt.state_dict())
    figures = resumed._device_pulse._figures.data_ptr()
    for one in (opt, twin, resumed):
        train(one, 9, 15)
    assert resumed._device_pulse._figures.data_ptr() == figures  # a CUDA graph may hold the address
    for other in (twin, resumed):
        assert other.pulse == opt.pulse
        for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "option"),
    [("sens", {"use_shadow": True}), ("sens", {"stochastic_rounding": True}), ("tion", {"geometry": "l1"})],
)
def test_what_needs_the_host_is_refused(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="capturable"):
        OPTIMIZERS[name].load()(parameters(), capturable=True, **option)


@pytest.mark.parametrize(
    ("name", "option"),
    [("sens", {"use_shadow": True}), ("sens", {"stochastic_rounding": True}), ("tion", {"geometry": "l1"})],
)
def test_what_needs_the_host_is_refused_in_a_group_and_in_a_state(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="capturable"):
        OPTIMIZERS[name].load()([{"params": parameters(), **option}], capturable=True)
    opt = OPTIMIZERS[name].load()(parameters(), capturable=True)
    with pytest.raises(BadInput, match="capturable"):
        opt.add_param_group({"params": parameters(), **option})
    before = opt.state_dict()
    with pytest.raises(BadInput, match="capturable"):
        opt.load_state_dict(OPTIMIZERS[name].load()(parameters(), **option).state_dict())
    assert opt.state_dict() == before


def test_the_state_dict_is_that_of_the_host() -> None:
    """A run may go on without `capturable`."""
    opt = EmoSens(parameters(), capturable=True)
    train(opt, 0, 5)
    host = EmoSens([nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]])
    host.load_state_dict(opt.state_dict())
    assert host.pulse == opt.pulse
    for one in (opt, host):
        train(one, 5, 9)
    close(opt, host, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@RULES
def test_on_a_gpu_a_step_waits_for_nothing_and_is_that_of_the_cpu(name: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(p.detach().to(device)) for p in parameters()]
        opt = OPTIMIZERS[name].load()(params, capturable=True, lr=3.0)
        for step in range(4):
            for number, p in enumerate(params):
                p.grad = torch.linspace(-1, 2 + step + number, p.numel(), dtype=p.dtype).view(p.shape).to(device)
            loss = torch.tensor(2.0 - 0.3 * step, dtype=torch.float64).to(device)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step measures the weights
            opt.observe(loss)
            opt.step()
            torch.cuda.set_sync_debug_mode("default")
        found[device] = [p.detach().cpu() for p in params]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
