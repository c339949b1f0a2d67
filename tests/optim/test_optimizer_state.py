"""Loss intake, refusals, saving and resuming: what every emo optimizer does alike."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from emomerge.errors import BadInput, MissingLossError, NonFiniteLossError
from emomerge.optim import OPTIMIZERS, EmoPulse, EmoSens, EmoVoid
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.pulse import PRESETS

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (name, {**geometry, "use_shadow": shadow})
    for name in OPTIMIZERS
    for geometry in ([{}, {"geometry": "l1"}] if name in ("tion", "void") else [{}])
    for shadow in (False, True)
]
EVERY = pytest.mark.parametrize(("name", "options"), VARIANTS)
STEPS = 24


def losses(step: int) -> float:
    return 1.0 / (1 + 0.1 * step) + (3.0 if step % 7 == 5 else 0.0)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 2)).to(dtype)


def train(opt: EmoOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.observe(losses(step))
        opt.step()


def bits(opt: EmoOptimizer) -> list[Any]:
    """All that training depends on: weights, state, pulse."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [{name: t.tolist() for name, t in opt.state.get(p, {}).items()} for p in params]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return [[p.tolist() for p in params], state, groups, opt.pulse.state_dict()]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preset", PRESETS)
@EVERY
@settings(max_examples=3, deadline=None)
@given(cut=st.integers(0, STEPS - 1))
def test_resumes_bit_identically(name: str, options: dict[str, Any], preset: str, cut: int) -> None:
    whole, first, second, third = (model() for _ in range(4))
    options = {**options, "preset": preset, "lr": 3.0}
    uncut = OPTIMIZERS[name](whole.parameters(), **options)
    train(uncut, 0, STEPS)
    opt = OPTIMIZERS[name](first.parameters(), **options)
    train(opt, 0, cut)
    saved, weights = opt.state_dict(), copy.deepcopy(first.state_dict())
    before = json.dumps(saved, default=lambda t: t.tolist())
    train(opt, cut, STEPS)  # goes on: the saved dict is a copy
    assert bits(opt) == bits(uncut)
    assert json.dumps(saved, default=lambda t: t.tolist()) == before
    for net, loaded in ((second, saved), (third, through_file(saved))):  # the same dict twice
        net.load_state_dict(weights)
        resumed = OPTIMIZERS[name](net.parameters(), lr=0.5)  # hyper-parameters follow the file, as in torch
        resumed.load_state_dict(loaded)
        train(resumed, cut, STEPS)
        assert bits(resumed)[:2] == bits(uncut)[:2]
        assert resumed.pulse == uncut.pulse
        assert resumed.param_groups[0].get("geometry") == uncut.param_groups[0].get("geometry")
    assert json.dumps(saved, default=lambda t: t.tolist()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_half_precision_resumes_with_its_fp32_state(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    whole, part = model(dtype), model(dtype)
    uncut = OPTIMIZERS[name](whole.parameters(), **options)
    train(uncut, 0, STEPS)
    opt = OPTIMIZERS[name](part.parameters(), **options)
    train(opt, 0, 9)
    resumed = OPTIMIZERS[name](part.parameters(), **options)
    resumed.load_state_dict(through_file(opt.state_dict()))
    train(resumed, 9, STEPS)
    assert bits(resumed) == bits(uncut)


@EVERY
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_and_pickles(name: str, options: dict[str, Any], clone: Any) -> None:
    opt = OPTIMIZERS[name](model().parameters(), preset="v3.9", **options)
    train(opt, 0, 5)
    twin = clone(opt)
    train(opt, 5, 10)
    train(twin, 5, 10)
    assert bits(twin) == bits(opt)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@EVERY
def test_distributed_checkpoint(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    net, other = model(), model()
    opt = OPTIMIZERS[name](net.parameters(), **options)
    train(opt, 0, 5)
    dcp.save({"optim": get_optimizer_state_dict(net, opt)}, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(net.state_dict())
    resumed = OPTIMIZERS[name](other.parameters(), **options)
    loaded = {"optim": get_optimizer_state_dict(other, resumed)}  # steps with lr=0 and no loss
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, loaded["optim"])
    train(opt, 5, 9)
    train(resumed, 5, 9)
    assert bits(resumed) == bits(opt)


def test_late_parameter_group() -> None:
    first, late = model(), nn.Linear(2, 2)
    opt = EmoSens(first.parameters())
    train(opt, 0, 5)
    opt.add_param_group({"params": late.parameters(), "lr": 0.25, "weight_decay": 0.0})
    assert opt.param_groups[1]["scope"] == 0.25
    before = opt.pulse.steps
    train(opt, 5, 6)
    assert opt.pulse.steps == before + 1 and len(opt.state) == 6
    resumed = EmoSens([{"params": first.parameters()}, {"params": late.parameters()}])
    resumed.load_state_dict(opt.state_dict())
    assert bits(resumed) == bits(opt)


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
def test_lr_zero_changes_nothing(name: str, options: dict[str, Any]) -> None:
    net = model()
    opt = OPTIMIZERS[name](net.parameters(), lr=0.0, **options)
    weights, pulse = copy.deepcopy(net.state_dict()), opt.pulse.state_dict()
    train(opt, 0, 3)
    opt.step()  # no loss is needed either
    assert opt.pulse.state_dict() == pulse
    assert all(torch.equal(net.state_dict()[key], value) for key, value in weights.items())
    live = OPTIMIZERS[name](net.parameters(), **options)
    live.observe(100.0)
    live.param_groups[0]["lr"] = 0.0
    live.step()
    live.param_groups[0]["lr"] = 1.0
    with pytest.raises(MissingLossError):  # the observation was consumed
        live.step()


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_changes_nothing(name: str, options: dict[str, Any], bad: float) -> None:
    opt, twin = (OPTIMIZERS[name](model().parameters(), **options) for _ in range(2))
    for one in (opt, twin):
        train(one, 0, 3)
    before = bits(opt)
    opt.observe(1.0)
    opt.observe(torch.tensor(bad))
    with pytest.raises(NonFiniteLossError):
        opt.step()
    assert bits(opt) == before
    with pytest.raises(MissingLossError):  # what was observed with it is gone
        opt.step()
    for one in (opt, twin):
        train(one, 3, 8)
    assert bits(opt) == bits(twin)


def test_missing_loss() -> None:
    for opt_class in OPTIMIZERS.values():
        opt = opt_class(model().parameters())
        with pytest.raises(MissingLossError, match="observe"):
            opt.step()
        with pytest.raises(MissingLossError, match="closure"):
            opt.step(lambda: None)  # type: ignore[arg-type,return-value]
        train(opt, 0, 1)
        with pytest.raises(MissingLossError):
            opt.step()
        assert opt.pulse.steps == 1


def test_micro_batches_are_averaged() -> None:
    opt = EmoSens(model().parameters())
    loss = torch.tensor([2.0], requires_grad=True).sum()
    opt.observe(loss)
    with torch.no_grad():
        loss /= 4  # what gradient accumulation does next must not reach the pulse
    opt.observe(1.0)
    opt.observe(torch.tensor(6, dtype=torch.int64))
    opt.step()
    assert opt.pulse.short == pytest.approx(3.0)


def test_closure_is_observed_and_returned() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = EmoSens([w])

    def closure() -> Tensor:
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 5.0
    assert opt.pulse.short == 5.0 and w[0] < 1


def test_float64_losses_keep_their_bits() -> None:
    opt, pulse = EmoSens(model().parameters()), EmoPulse()
    for value in (1 / 3, 0.1, 0.7):
        opt.observe(torch.tensor(value, dtype=torch.float64) if value == 0.1 else value)
        opt.step()
        pulse.update(value)
    assert opt.pulse == pulse


def test_no_host_sync_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = EmoSens(model().parameters())
    syncs = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, f=original, n=name, **k: (syncs.append(n), f(self, *a, **k))[1])
    for _ in range(3):
        opt.observe(torch.tensor(1.0))
    assert not syncs
    train(opt, 0, 1)
    assert len([name for name in syncs if name != "__float__"]) <= 1 and syncs.count("__float__") <= 1


@pytest.mark.parametrize("loss", [torch.ones(3), torch.tensor(1 + 1j)])
def test_a_loss_is_one_real_number(loss: Tensor) -> None:
    with pytest.raises(BadInput, match="one real number"):
        EmoSens(model().parameters()).observe(loss)


def test_schedulers_that_write_lr_are_refused() -> None:
    opt = EmoSens(model().parameters())
    constant = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    train(opt, 0, 2)
    constant.step()
    train(opt, 2, 3)
    torch.optim.lr_scheduler.ExponentialLR(opt, 0.9).step()
    before = bits(opt)
    with pytest.raises(BadInput, match=r"scheduler.*param_groups\[0\]\['lr'\]; expected 1.0; found 0.9.*constant"):
        train(opt, 3, 4)
    assert bits(opt) == before
    opt.param_groups[0]["scope"] = 0.9  # the way the message names
    train(opt, 3, 4)
    assert opt.pulse.steps == 4


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_unusable_gradients_are_refused(kind: str) -> None:
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64 if kind == "complex" else torch.float32))
    opt = EmoSens([p, nn.Parameter(torch.ones(3))])
    p.grad = torch.ones_like(p) if kind == "complex" else torch.eye(2).to_sparse()
    opt.observe(1.0)
    with pytest.raises(BadInput, match=rf"EmoSens cannot use a {kind} gradient: parameter of shape \(2, 2\)"):
        opt.step()
    assert opt.pulse.steps == 0 and not opt.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.tensor(1.0)}, "lr"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"preset": "v4"}, "unknown preset"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EmoSens(model().parameters(), **options)
    if "preset" not in options:
        with pytest.raises(BadInput, match=message):
            EmoSens([{"params": model().parameters(), **options}])


def test_unknown_options() -> None:
    with pytest.raises(BadInput, match="exact | l1"):
        EmoVoid(model().parameters(), geometry="l2")  # type: ignore[arg-type]
    for opt_class in OPTIMIZERS.values():
        with pytest.raises(TypeError, match="wd"):
            opt_class(model().parameters(), wd=0.1)  # type: ignore[call-arg]


def test_foreign_state_is_refused_before_anything_changes() -> None:
    net = model()
    adam = torch.optim.AdamW(net.parameters())
    opt = EmoSens(net.parameters())
    train(opt, 0, 2)
    before = bits(opt)
    with pytest.raises(BadInput, match="not the state of an emoPulse"):
        opt.load_state_dict(adam.state_dict())
    assert bits(opt) == before


def _replica(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    opt = EmoSens(model().parameters())
    for step in range(4):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        opt.observe(1.0 + rank + step)
        opt.step()
    opt.observe(math.nan if rank else 1.0)
    try:
        opt.step()
    except NonFiniteLossError:
        Path(folder, f"{rank}.json").write_text(json.dumps(opt.pulse.state_dict()))
    dist.destroy_process_group()


def test_ranks_share_the_mean_loss(tmp_path: Path) -> None:
    mp.spawn(_replica, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = EmoPulse()
    for step in range(4):
        alone.update(1.5 + step)
    assert first == second == alone.state_dict()
