"""Parameter groups, and parameters that come late, stay without a gradient, are frozen or hold nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from emomerge.optim import OPTIMIZERS, EmoSens, EmoTion, EmoVoid, reference
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.reference import REFERENCE

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
EVERY = pytest.mark.parametrize(("name", "options"), VARIANTS)
GROUPS: list[dict[str, Any]] = [
    {},
    {"lr": 0.25, "betas": (0.5, 0.9), "weight_decay": 0.0},
    {"lr": 7.0, "weight_decay": 0.3, "eps": 1e-3},
    {"lr": 0.0},
]


def parameters(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(step: int, params: list[nn.Parameter]) -> None:
    for k, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * k + step)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def take_step(opt: EmoOptimizer, step: int) -> None:
    opt.observe(1 / (1 + step) + (2.0 if step == 6 else 0.0))
    opt.step()


def l1(tensors: list[Tensor]) -> float:
    return sum(float(t.abs().sum()) for t in tensors)


def finite(opt: EmoOptimizer) -> bool:
    return all(t.isfinite().all() for state in opt.state.values() for t in state.values())


@EVERY
def test_each_group_follows_its_own_options(path: str, name: str, options: dict[str, Any]) -> None:
    params = [parameters(number, (4, 3), (5,)) for number in range(len(GROUPS))]
    opt = OPTIMIZERS[name].load()([{"params": ps, **group} for ps, group in zip(params, GROUPS, strict=True)], **options)
    ws = [[p.detach().clone() for p in ps] for ps in params]
    states: list[list[dict[str, Any]]] = [[{}, {}] for _ in params]
    last = None
    for step in range(12):
        now = l1([w for group in ws for w in group])
        scale = 1.0 if last is None else last / (now + 1e-8)
        change = None if last is None else abs(now - last) / (last + 1e-8)
        last = now * (scale if name == "void" else 1)
        give_gradients(step, [p for ps in params for p in ps])
        take_step(opt, step)
        for ps, group, new, state in zip(params, GROUPS, ws, states, strict=True):
            if group.get("lr") == 0:
                continue
            beta1, beta2 = group.get("betas", (0.9, 0.995))
            own = {key: group[key] for key in ("weight_decay", "eps") if key in group}
            settings = reference.Hyperparameters(beta1, beta2, **own, **options, l1_change=change, l1_scale=scale)
            rate = opt.pulse.rate_at(group.get("lr", 1.0))
            for k, p in enumerate(ps):
                new[k], state[k] = REFERENCE[name](new[k], p.grad, state[k], rate, settings)
                torch.testing.assert_close(p.detach(), new[k], atol=1e-12, rtol=1e-12)
                for key, value in state[k].items():
                    torch.testing.assert_close(opt.state[p][key], value, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(p, w) for p, w in zip(params[3], ws[3], strict=True))


def test_each_group_has_its_own_scope() -> None:
    w, half, still = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    opt = EmoVoid([{"params": [w]}, {"params": [half], "lr": 0.5}, {"params": [still], "lr": 0.0}], geometry="l1")
    for p in (w, half, still):
        p.grad = torch.ones_like(p)
    opt.observe(1.0)
    opt.step()
    assert (1 - w).tolist() == pytest.approx([1e-4] * 2)
    assert (1 - half).tolist() == pytest.approx([5e-5] * 2)
    assert still.tolist() == [1, 1]
    lone = EmoSens([{"params": [w], "lr": 0.5}])
    lone.observe(1.0)
    lone.step()
    assert lone.pulse.rate == pytest.approx(5e-5)  # the rate shown is the first group's


@EVERY
def test_a_late_group(path: str, name: str, options: dict[str, Any]) -> None:
    """The parameters so far do not notice it; it follows its own options, at the pulse of all."""
    first, alone = (parameters(0, (4, 3), (5,)) for _ in range(2))
    late = parameters(1, (40, 30), (2,))
    opt, without = OPTIMIZERS[name].load()(first, **options), OPTIMIZERS[name].load()(alone, **options)
    for step in range(10):
        if step == 5:
            opt.add_param_group({"params": late, "lr": 0.25, "weight_decay": 0.0})
            assert opt.param_groups[1]["scope"] == 0.25
            before = [p.detach().clone() for p in late]
        for params in (first + late, alone):
            give_gradients(step, params)
        for one in (opt, without):
            take_step(one, step)
        if options.get("geometry") != "l1":  # whose Σ|W| is that of all
            assert all(torch.equal(p, q) for p, q in zip(first, alone, strict=True))
        if step == 5:
            states = [
                REFERENCE[name](w, p.grad, {}, opt.pulse.rate_at(0.25), reference.Hyperparameters(weight_decay=0.0, **options))
                for w, p in zip(before, late, strict=True)
            ]
            for p, (w, _) in zip(late, states, strict=True):
                torch.testing.assert_close(p.detach(), w, atol=1e-12, rtol=1e-12)
    assert opt.pulse == without.pulse
    for p, q in zip(first, alone, strict=True):
        torch.testing.assert_close(p, q, atol=0.1, rtol=0)
    resumed = OPTIMIZERS[name].load()([{"params": first}, {"params": late}], **options)
    resumed.load_state_dict(opt.state_dict())
    twins = copy.deepcopy((resumed, first + late))
    for one, params in ((opt, first + late), twins):
        give_gradients(10, params)
        take_step(one, 10)
    assert all(torch.equal(p, q) for p, q in zip(first + late, twins[1], strict=True))


@pytest.mark.parametrize("geometry", ["exact", "l1"])
def test_a_late_group_is_no_jump_of_the_norm(geometry: str) -> None:
    """Its weights are not new growth that EmoVoid undoes and EmoTion takes for news."""
    for opt_class in (EmoVoid, EmoTion):
        (w,), (late,) = parameters(0, (5,)), parameters(1, (5,))
        opt = opt_class([w], geometry=geometry)
        for step in range(4):
            if step == 3:
                opt.add_param_group({"params": [late]})
            before = w.detach().clone()
            give_gradients(step, [w, late])
            take_step(opt, step)
            assert (w - before).abs().max() < 1e-3


@pytest.mark.parametrize("place", [0, 1])
@EVERY
def test_an_empty_group(name: str, options: dict[str, Any], place: int) -> None:
    params, alone = (parameters(0, (4, 3), (5,)) for _ in range(2))

    def build() -> EmoOptimizer:
        groups: list[dict[str, Any]] = [{"params": params}]
        groups.insert(place, {"params": []})
        return OPTIMIZERS[name].load()(groups, **options)

    opt, without = build(), OPTIMIZERS[name].load()(alone, **options)
    for step in range(4):
        if step == 2:
            resumed = build()
            resumed.load_state_dict(opt.state_dict())
            opt = resumed
        for one, ps in ((opt, params), (without, alone)):
            give_gradients(step, ps)
            take_step(one, step)
    assert opt.pulse == without.pulse
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


@EVERY
def test_a_parameter_without_a_gradient_and_one_frozen_later(path: str, name: str, options: dict[str, Any]) -> None:
    never, frozen, live = parameters(0, (3, 2), (4, 3), (5,))
    start = never.detach().clone()
    opt = OPTIMIZERS[name].load()([never, frozen, live], **options)
    for step in range(8):
        give_gradients(step, [frozen, live])
        if step >= 4:
            frozen.requires_grad_(False)
            frozen.grad = None
        if step == 4:
            held = frozen.detach().clone()
            state = {key: t.clone() for key, t in opt.state.get(frozen, {}).items()}
        before = live.detach().clone()
        take_step(opt, step)
        assert not torch.equal(live, before)
    assert torch.equal(never, start) and never not in opt.state
    assert torch.equal(frozen, held)
    assert all(torch.equal(opt.state[frozen][key], t) for key, t in state.items())
    twins = copy.deepcopy((never, frozen, live))
    resumed = OPTIMIZERS[name].load()(twins, **options)
    resumed.load_state_dict(opt.state_dict())
    for one, q in ((opt, live), (resumed, twins[2])):
        give_gradients(9, [q])
        take_step(one, 9)
    assert torch.equal(live, twins[2])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("idle", [False, True])
@EVERY
def test_unused_parameters_in_a_distributed_checkpoint(name: str, options: dict[str, Any], idle: bool, tmp_path: Any) -> None:
    def build() -> tuple[nn.Module, EmoOptimizer]:
        torch.manual_seed(0)
        net = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
        net.register_parameter("none", nn.Parameter(torch.empty(0, 2)))
        groups = [{"params": net["used"].parameters()}, {"params": [*net["unused"].parameters(), net.none]}]
        return net, OPTIMIZERS[name].load()(groups, lr=3.0, **options)

    def train(net: nn.Module, opt: EmoOptimizer, start: int, stop: int) -> list[Any]:
        for step in range(start, stop):
            give_gradients(step, list((net["used"] if idle else net).parameters()))
            take_step(opt, step)
        return [p.tolist() for p in net.parameters()]

    net, opt = build()
    train(net, opt, 0, 3)
    saved = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, opt)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    uncut = train(net, opt, 3, 6)
    net, resumed = build()
    loaded = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    net.load_state_dict(loaded["model"])
    set_optimizer_state_dict(net, resumed, loaded["optim"])
    assert train(net, resumed, 3, 6) == uncut
    assert resumed.pulse == opt.pulse
    assert finite(resumed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("shadow", [False, True])
@EVERY
def test_parameters_without_elements(
    path: str, name: str, options: dict[str, Any], shadow: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    params, alone = parameters(0, (4, 3), shape, dtype=dtype), parameters(0, (4, 3), dtype=dtype)
    opt, without = (OPTIMIZERS[name].load()(ps, use_shadow=shadow, **options) for ps in (params, alone))
    for step in range(8):
        for one, ps in ((opt, params), (without, alone)):
            give_gradients(step, ps)
            one.param_groups[0]["lr"] = 0.0  # the step that makes the state for torch.distributed.checkpoint
            one.step()
            one.param_groups[0]["lr"] = 1.0
            take_step(one, step)
    assert torch.equal(params[0], alone[0]) and opt.pulse == without.pulse
    assert finite(opt)
