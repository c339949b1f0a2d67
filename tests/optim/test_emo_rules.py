"""The five rules, compiled and in torch's operations, against their readable twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emomerge.optim import OPTIMIZERS, EmoAiry, EmoSens, EmoTion, EmoVoid, native, reference
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.pulse import PRESETS
from emomerge.optim.reference import REFERENCE

LOSSES = [1.0, 0.9, 0.95, 0.7, 0.72, 4.0, 4.2, 3.9, 0.6, 0.5, 0.45, 0.44]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sens", {}),
    ("airy", {}),
    ("airy", {"sign": False}),
    ("cats", {}),
    ("tion", {}),
    ("tion", {"geometry": "l1"}),
    ("void", {}),
    ("void", {"geometry": "l1"}),
]
SHAPES = [(4, 3), (5,), (2, 3, 2), ()]


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    """Parameters of every number of dimensions, and a gradient of each for every step."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]

    return [nn.Parameter(w) for w in draw()], [draw() for _ in LOSSES]


def run(opt: EmoOptimizer, params: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for loss, grads in zip(LOSSES, gradients, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.observe(loss)
        opt.step()
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, g)  # gradients are read, never changed


def change_of_l1(now: float, last: float | None) -> float | None:
    return None if last is None else abs(now - last) / (last + 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_is_the_reference(path: str, name: str, options: dict[str, Any], shadow: bool, dtype: torch.dtype) -> None:
    params, gradients = problem(dtype)
    opt = OPTIMIZERS[name].load()(params, lr=50.0, use_shadow=shadow, **options)
    ws = [p.detach().clone() for p in params]
    slow, states = [w.clone() for w in ws], [{} for _ in ws]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    jumps, last = 0, None
    for loss, grads in zip(LOSSES, gradients, strict=True):
        now = sum(float(w.abs().sum()) for w in ws)  # before the shadow
        scale = 1.0 if last is None else last / (now + 1e-8)
        settings = reference.Hyperparameters(**options, l1_change=change_of_l1(now, last), l1_scale=scale)
        last = now * (scale if name == "void" else 1)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.observe(loss)
        opt.step()
        jumps += shadow and abs(opt.pulse.sigma) > 0.625
        for k, g in enumerate(grads):
            if shadow:
                ws[k], slow[k] = reference.shadow(ws[k], slow[k], opt.pulse.sigma, opt.pulse.trust)
            ws[k], states[k] = REFERENCE[name](ws[k], g, states[k], opt.pulse.rate, settings)
            torch.testing.assert_close(params[k].detach(), ws[k], atol=tolerance, rtol=tolerance)
            for key, value in states[k].items():
                torch.testing.assert_close(opt.state[params[k]][key], value, atol=tolerance, rtol=tolerance)
    assert bool(jumps) == shadow


@pytest.mark.parametrize("shape", [(300, 211), (3, 40_001), (70_001,), (2, 3, 9000)])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_blocks_cover_large_tensors(path: str, name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    turned = nn.Parameter(p.detach().clone().mT.contiguous().mT if p.dim() > 1 else p.detach().clone())  # another layout
    w = p.detach().clone()
    opt, other = (OPTIMIZERS[name].load()([q], lr=3.0, **options) for q in (p, turned))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    for one, q in ((opt, p), (other, turned)):
        q.grad = grad
        one.observe(1.0)
        one.step()
    w, state = REFERENCE[name](w, grad, {}, opt.pulse.rate, reference.Hyperparameters(**options))
    for one, q in ((opt, p), (other, turned)):
        torch.testing.assert_close(q.detach(), w, atol=1e-12, rtol=1e-12)
        for key, value in state.items():
            torch.testing.assert_close(one.state[q][key], value, atol=1e-12, rtol=1e-12)


def test_airy_steps_by_the_sign_of_the_gradient(path: str) -> None:
    params, gradients = problem()
    twins, _ = problem()
    run(EmoAiry(params, weight_decay=0.0), params, gradients)
    rates = []
    pulse = EmoAiry(twins).pulse
    for loss, grads in zip(LOSSES, gradients, strict=True):
        rates.append(pulse.update(loss))
        for p, g in zip(twins, grads, strict=True):
            p.data.sub_(rates[-1] * g.sign())
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), twin.detach(), atol=1e-12, rtol=0)


def test_airy_state_is_small() -> None:
    p = nn.Parameter(torch.ones(30, 20, 2))
    opt = EmoAiry([p])
    p.grad = torch.ones_like(p)
    opt.observe(1.0)
    opt.step()
    assert {name: tuple(t.shape) for name, t in opt.state[p].items()} == {"r": (30, 1, 1), "c": (1, 20, 2)}


def test_zero_gradient_moves_only_by_decay(path: str) -> None:
    for name, entry in OPTIMIZERS.items():
        p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        opt = entry.load()([p])
        p.grad = torch.zeros_like(p)
        opt.observe(1.0)
        opt.step()
        factor = 1.0 if name == "void" else 1 - 0.01 * opt.pulse.rate
        assert p.tolist() == pytest.approx([factor, -2 * factor], abs=1e-15)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_gradient_that_is_not_a_number(path: str, name: str, options: dict[str, Any]) -> None:
    """Neither path hides what the formula makes of it."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    opt = OPTIMIZERS[name].load()([w], **options)
    before = w.detach().clone()
    w.grad = torch.tensor([1.0, math.nan, -1.0], dtype=torch.float64)
    opt.observe(1.0)
    opt.step()
    new, state = REFERENCE[name](before, w.grad, {}, opt.pulse.rate, reference.Hyperparameters(**options))
    torch.testing.assert_close(w.detach(), new, atol=1e-12, rtol=1e-12, equal_nan=True)
    for key, value in state.items():
        torch.testing.assert_close(opt.state[w][key], value, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_void_holds_the_norm_for_55_steps_and_again_at_rest() -> None:
    w = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))
    opt = EmoVoid([w], geometry="l1")
    norms, held, rest = [], [], None
    for step in range(1, 900):
        w.grad = -torch.ones_like(w)  # every step wants to grow Σ|W| by 8η
        opt.observe(0.5)
        opt.step()
        norms.append(float(w.detach().abs().sum()))
        held.append(opt.scale != 1.0)
        if rest is None and opt.pulse.should_stop:
            rest = step
    assert rest is not None
    active = [step for step, on in enumerate(held, start=1) if on]
    assert active == [*range(2, 56), *range(rest + 1, rest + 56)]
    start = 8.0
    assert norms[54] == pytest.approx(start, abs=8 * 1.1e-4)  # held: only the last step's growth shows
    assert norms[99] > norms[54] + 40 * 8e-5  # not held: it grows


def test_tion_momentum_takes_in_fresh_gradients_only(path: str) -> None:
    for along in (True, False):
        w = nn.Parameter(torch.tensor([3.0, 4.0]))
        opt = EmoTion([w])
        w.grad = torch.tensor([3.0, 4.0]) if along else torch.tensor([-4.0, 3.0])
        opt.observe(1.0)
        opt.step()
        expected = [0.0, 0.0] if along else [-0.4, 0.3]
        assert opt.state[w]["m"].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_maximize_is_minimising_the_mirrored_problem(path: str, name: str, options: dict[str, Any], preset: str) -> None:
    params, gradients = problem()
    mirrored, _ = problem()
    up = OPTIMIZERS[name].load()(params, preset=preset, maximize=True, **options)
    down = OPTIMIZERS[name].load()(mirrored, preset=preset, **options)
    for loss, grads in zip(LOSSES, gradients, strict=True):
        for p, q, g in zip(params, mirrored, grads, strict=True):
            p.grad, q.grad = g.clone(), -g
        up.observe(loss)
        down.observe(-loss)
        up.step()
        down.step()
    assert up.pulse == down.pulse
    for p, q in zip(params, mirrored, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_half_precision_rounds_once_a_step(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "fits", lambda *tensors: False)  # half precision has no compiled kernels
    params, gradients = problem(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    half_opt = OPTIMIZERS[name].load()(params, lr=20.0, use_shadow=True, **options)
    wide_opt = OPTIMIZERS[name].load()(wide, lr=20.0, use_shadow=True, **options)
    for loss, grads in zip(LOSSES, gradients, strict=True):
        for p, q, g in zip(params, wide, grads, strict=True):
            p.grad, q.grad = g.clone(), g.float()
        for opt in (half_opt, wide_opt):
            opt.observe(loss)
            opt.step()
        with torch.no_grad():
            for p, q in zip(params, wide, strict=True):
                q.copy_(q.to(dtype))
                assert torch.equal(p.float(), q)
    for state in half_opt.state.values():
        assert all(t.dtype == torch.float32 for t in state.values())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_does_not_depend_on_the_number_of_threads(path: str, name: str, options: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            params = [
                nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 40_001), (70_001,), (900, 1200), (50,))
            ]
            opt = OPTIMIZERS[name].load()(params, lr=10.0, use_shadow=True, **options)
            for loss in LOSSES[:7]:
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                opt.observe(loss)
                opt.step()
            results.append([*params, *(t for p in params for t in opt.state[p].values())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sens_without_the_fused_kernel_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs)))
    results = []
    for present in (True, False):
        if not present:
            monkeypatch.delattr(torch, "_fused_adamw_")
        params, gradients = problem(dtype)
        run(EmoSens(params, lr=50.0), params, gradients)
        results.append(params)
    assert len(calls) == len(LOSSES)
    torch.testing.assert_close(*results)


def test_converges_on_a_small_regression() -> None:
    for entry in OPTIMIZERS.values():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 5, generator=generator)
        y = x @ torch.randn(5, 1, generator=generator) * 0.1
        w = nn.Parameter(torch.zeros(5, 1) + 0.01)
        opt = entry.load()([w], preset="guarded")

        def closure(w: nn.Parameter = w, x: Tensor = x, y: Tensor = y) -> Tensor:
            w.grad = None
            loss = (x @ w - y).square().mean()
            loss.backward()
            return loss.detach()

        first = float(opt.step(closure))
        for _ in range(900):
            last = float(opt.step(closure))
        assert last < 0.5 * first
