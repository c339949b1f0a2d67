"""Loss intake, refusals, saving and resuming: what every emo optimizer does alike."""

from __future__ import annotations

import copy
import json
import math
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from emomerge.errors import BadInput, MissingLossError, NonFiniteLossError
from emomerge.optim import OPTIMIZERS, EmoPulse, EmoSens, EmoVoid
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.pulse import PRESETS

RULES: list[tuple[str, dict[str, Any]]] = [
    (name, geometry)
    for name in OPTIMIZERS
    for geometry in ([{"geometry": "exact"}, {"geometry": "l1"}] if name in ("tion", "void") else [{}])
]
VARIANTS = [(name, {**geometry, "use_shadow": shadow}) for name, geometry in RULES for shadow in (False, True)]
EVERY = pytest.mark.parametrize(("name", "options"), VARIANTS)
STEPS = 60
RUNS: dict[str, dict[str, Any]] = {preset: {"preset": preset, "use_shadow": True} for preset in PRESETS} | {
    "no shadow": {},
    "bfloat16": {"dtype": torch.bfloat16, "stochastic_rounding": True, "use_shadow": True},
    "float16": {"dtype": torch.float16, "use_shadow": True},
    "float64": {"dtype": torch.float64, "use_shadow": True},
}


def losses(step: int) -> float:
    return 1.0 / (1 + 0.1 * step) + (3.0 if step % 7 == 5 else 0.0)


@cache
def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 2)).to(dtype)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(model_of(dtype))


def train(opt: EmoOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.observe(losses(step))
        opt.step()


def bits(opt: EmoOptimizer) -> str:
    """All that training depends on, every bit of it: weights, state, groups, pulse."""
    params = [p for group in opt.param_groups for p in group["params"]]
    tensors = [[[name, str(t.dtype), t.tolist()] for name, t in {"w": p, **opt.state.get(p, {})}.items()] for p in params]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return json.dumps([tensors, groups, opt.pulse.state_dict()])


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, EmoOptimizer]:
    net = model(dtype)
    return net, OPTIMIZERS[name].load()(net.parameters(), **options)


def save_every_step(folder: Path, name: str, options: dict[str, Any]) -> None:
    """An uninterrupted run, with its state before every step in files."""
    net, opt = build(name, **options)
    states, named, every = [], {}, []
    for step in range(STEPS):
        if options.get("preset") == "v3.8":  # at the first step this makes the state's tensors
            named[str(step)] = {"model": copy.deepcopy(net.state_dict()), "optim": get_optimizer_state_dict(net, opt)}
        states.append({"model": copy.deepcopy(net.state_dict()), "optim": opt.state_dict()})
        every.append(bits(opt))
        train(opt, step, step + 1)
    torch.save({"name": name, "options": options, "states": states, "every": [*every, bits(opt)]}, folder / "run.pt")
    if named:
        dcp.save(named, checkpoint_id=folder / "dcp", no_dist=True)


def continues(opt: EmoOptimizer, step: int, stop: int, every: list[str]) -> bool:
    """Whether the state before a step, and the one after the steps up to `stop`, are those of the uninterrupted run."""
    before = bits(opt) == every[step]
    train(opt, step, stop)
    return before and bits(opt) == every[stop]


def continue_every_step(_: int, folder: Path) -> None:
    """In a new process: one step from each saved state leads to the next one, and so to the end. A few do go there."""
    torch.set_num_threads(1)
    wrong: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/run.pt")):
        run = torch.load(file, weights_only=True)
        name, options, every, found = run["name"], run["options"], run["every"], []
        for step, state in enumerate(run["states"]):
            for stop in (step + 1, STEPS)[: 1 + (step % 20 == 7)]:  # the same dict, then, twice
                net, opt = build(name, options.get("dtype", torch.float32))  # hyper-parameters follow the file, as in torch
                net.load_state_dict(state["model"])
                opt.load_state_dict(state["optim"])
                if not continues(opt, step, stop, every):
                    found.append(f"{step} to {stop}")
        if (named := file.with_name("dcp")).exists():
            pairs = [build(name, **options) for _ in range(STEPS)]
            loaded = {  # get_optimizer_state_dict makes the state by a step with lr=0 and no loss
                str(step): {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, opt)}
                for step, (net, opt) in enumerate(pairs)
            }
            dcp.load(loaded, checkpoint_id=named, no_dist=True)
            for step, (net, opt) in enumerate(pairs):
                net.load_state_dict(loaded[str(step)]["model"])
                set_optimizer_state_dict(net, opt, loaded[str(step)]["optim"])
                if not continues(opt, step, step + 1, every):
                    found.append(f"{step} by torch.distributed.checkpoint")
        wrong[file.parent.name] = found
    (folder / "wrong.json").write_text(json.dumps(wrong))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By rule and run, the steps from which a new process did not continue as the uninterrupted run did."""
    folder = tmp_path_factory.mktemp("resume")
    for rule, (name, options) in enumerate(RULES):
        for run, more in RUNS.items():
            (folder / f"{rule} {run}").mkdir()
            save_every_step(folder / f"{rule} {run}", name, {"lr": 3.0, **options, **more})
    mp.spawn(continue_every_step, args=(folder,), nprocs=1)
    return json.loads((folder / "wrong.json").read_text())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rule", range(len(RULES)), ids=[f"{name} {options}" for name, options in RULES])
def test_resumes_bit_identically_at_every_step(wrong: dict[str, list[str]], rule: int, run: str) -> None:
    assert wrong[f"{rule} {run}"] == []


@EVERY
def test_resumes_bit_identically_at_rest(name: str, options: dict[str, Any]) -> None:
    net, opt = build(name, lr=3.0, **options)
    opt.pulse.noise, opt.pulse.distance = 0.0, 1.0  # where 600 steps of one loss lead
    rest = []

    def take_step(opt: EmoOptimizer, loss: float) -> None:
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.cos(9 * p.detach())
        opt.observe(loss)
        opt.step()

    for loss in (0.5, 0.5, 0.5, 0.6, 0.5):
        take_step(opt, loss)
        rest.append(opt.pulse.should_stop)
        twin, resumed = build(name)
        twin.load_state_dict(net.state_dict())
        resumed.load_state_dict(opt.state_dict())
        assert bits(resumed) == bits(opt)
        after = copy.deepcopy((net, opt))[1]
        take_step(after, 0.55)
        take_step(resumed, 0.55)
        assert bits(resumed) == bits(after)
    assert rest == [True] * 3 + [False] * 2


@EVERY
def test_a_saved_state_is_a_copy(name: str, options: dict[str, Any]) -> None:
    opt = build(name, **options)[1]
    train(opt, 0, 5)
    saved = opt.state_dict()
    before = json.dumps(saved, default=lambda t: t.tolist())
    resumed = build(name, **options)[1]
    resumed.load_state_dict(saved)
    train(opt, 5, 9)
    train(resumed, 5, 9)
    assert json.dumps(saved, default=lambda t: t.tolist()) == before


@EVERY
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_and_pickles(name: str, options: dict[str, Any], clone: Any) -> None:
    opt = OPTIMIZERS[name].load()(model().parameters(), preset="v3.9", **options)
    train(opt, 0, 5)
    twin = clone(opt)
    train(opt, 5, 10)
    train(twin, 5, 10)
    assert bits(twin) == bits(opt)


@EVERY
def test_lr_zero_changes_nothing(name: str, options: dict[str, Any]) -> None:
    net = model()
    opt = OPTIMIZERS[name].load()(net.parameters(), lr=0.0, **options)
    weights, pulse = copy.deepcopy(net.state_dict()), opt.pulse.state_dict()
    train(opt, 0, 3)
    opt.step()  # no loss is needed either
    assert opt.pulse.state_dict() == pulse
    assert all(torch.equal(net.state_dict()[key], value) for key, value in weights.items())
    live = OPTIMIZERS[name].load()(net.parameters(), **options)
    live.observe(100.0)
    live.param_groups[0]["lr"] = 0.0
    live.step()
    live.param_groups[0]["lr"] = 1.0
    with pytest.raises(MissingLossError):  # the observation was consumed
        live.step()


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_changes_nothing(name: str, options: dict[str, Any], bad: float) -> None:
    opt, twin = (OPTIMIZERS[name].load()(model().parameters(), **options) for _ in range(2))
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
    for entry in OPTIMIZERS.values():
        opt = entry.load()(model().parameters())
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


@pytest.mark.parametrize(("name", "options"), RULES)
def test_accumulation_trains_as_the_whole_batch(name: str, options: dict[str, Any]) -> None:
    def run(micro_batches: int) -> tuple[list[Tensor], list[tuple[float, ...]]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 10))
        opt = OPTIMIZERS[name].load()(net.parameters(), preset="v3.9", **options)  # whose rate moves at every step
        generator, pulse = torch.Generator().manual_seed(1), []
        for _ in range(40):
            x = torch.randn(32, 1, 8, 8, generator=generator)
            y = torch.randint(10, (32,), generator=generator)
            opt.zero_grad()
            for part, label in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                loss = nn.functional.cross_entropy(net(part), label)
                opt.observe(loss)
                (loss / micro_batches).backward()
            opt.step()
            p = opt.pulse
            assert abs(p.long - p.short) < 0.05 * p.long  # beyond, the rounding of the loss may choose the branch of σ
            pulse.append((p.short, p.medium, p.long, p.sigma, p.dnr, p.rate / 1e-4))
        return [w.detach() for w in net.parameters()], pulse

    (whole, pulse), (parts, same) = run(1), run(4)
    assert len({figures[-1] for figures in pulse}) > 30
    for figures, others in zip(pulse, same, strict=True):
        assert others == pytest.approx(figures, rel=1e-6, abs=1e-6)
    for w, v in zip(whole, parts, strict=True):
        torch.testing.assert_close(v, w, atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize(("name", "options"), RULES)
def test_a_step_sees_what_has_changed_since_the_last(name: str, options: dict[str, Any], path: str) -> None:
    def trained(change: bool) -> tuple[EmoOptimizer, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(3)]
        opt = OPTIMIZERS[name].load()(weights, lr=30.0, **options)
        for step in range(6):
            for number, p in enumerate(weights):
                p.grad = torch.randn(6, 4, generator=generator)
                if change and (step, number) == (2, 1):
                    p.grad = p.grad.t().contiguous().t()
            if change and step == 3:
                weights[0].data = weights[0].data.t().contiguous().t()
            if change and step == 4:
                for state in opt.state.values():
                    state.update({key: value.clone() for key, value in state.items()})
            if step == 5:
                weights[2].grad = None
            opt.observe(1.0)
            opt.step()
        return opt, [*weights, *(value for state in opt.state.values() for value in state.values())]

    torch.testing.assert_close(trained(True)[1], trained(False)[1], rtol=1e-5, atol=1e-6)


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
        ({"betas": 0.9}, "betas; expected two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas; expected two numbers"),
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
    for entry in OPTIMIZERS.values():
        with pytest.raises(TypeError, match="wd"):
            entry.load()(model().parameters(), wd=0.1)


def test_foreign_state_is_refused_before_anything_changes() -> None:
    net = model()
    adam = torch.optim.AdamW(net.parameters())
    opt = EmoSens(net.parameters())
    train(opt, 0, 2)
    before = bits(opt)
    with pytest.raises(BadInput, match="not the state of an emoPulse"):
        opt.load_state_dict(adam.state_dict())
    assert bits(opt) == before


@pytest.mark.parametrize("other", ["rule", "shape"])
@pytest.mark.parametrize("name", ["sens", "airy", "cats", "tion"])
def test_state_of_another_rule_or_shape_is_refused_before_anything_changes(name: str, other: str) -> None:
    w, v = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(1 if other == "rule" else 16, 8))
    saved, opt = OPTIMIZERS[name].load()([w]), OPTIMIZERS["cats" if other == "rule" and name != "cats" else "tion"].load()([v])
    if other == "shape":
        opt = OPTIMIZERS[name].load()([v])
    for step, (one, p) in enumerate(((saved, w), (opt, v))):
        p.grad = torch.ones_like(p)
        one.observe(losses(step))
        one.step()
    before = bits(opt)
    with pytest.raises(BadInput, match="another optimizer or to a parameter of another shape: state of parameter 0"):
        opt.load_state_dict(saved.state_dict())
    assert bits(opt) == before


def test_options_out_of_range_in_a_state_are_refused() -> None:
    opt = build("void")[1]
    saved, before = opt.state_dict(), bits(opt)
    for name, value in {"lr": math.nan, "geometry": "l2"}.items():
        with pytest.raises(BadInput, match=f"{name}"):
            opt.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], name: value}]})
    assert bits(opt) == before


@EVERY
def test_a_state_saved_before_an_option_existed(name: str, options: dict[str, Any]) -> None:
    opt = build(name, **options)[1]
    train(opt, 0, 3)
    saved = opt.state_dict()
    for option in ("stochastic_rounding", "maximize", "scope"):
        del saved["param_groups"][0][option]
    twin = copy.deepcopy(opt)
    twin.load_state_dict(saved)
    for one in (opt, twin):
        train(one, 3, 5)
    assert json.loads(bits(twin))[::2] == json.loads(bits(opt))[::2]


@EVERY
def test_a_state_somebody_looked_into(name: str, options: dict[str, Any]) -> None:
    opt, twin = (build(name, **options)[1] for _ in range(2))
    for p in opt.param_groups[0]["params"]:
        assert not opt.state[p]  # the defaultdict makes an empty entry
    for one in (opt, twin):
        train(one, 0, 3)
        one.state.clear()  # a fresh start of the moments
        train(one, 3, 5)
    assert bits(opt) == bits(twin)


@pytest.mark.parametrize(("name", "options"), RULES)
def test_a_shadow_that_starts_late(name: str, options: dict[str, Any]) -> None:
    opt = build(name, **options)[1]
    train(opt, 0, 3)
    opt.param_groups[0]["use_shadow"] = True
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    train(opt, 3, 4)  # the shadow follows weights that it equals
    assert all(torch.equal(opt.state[p]["shadow"], w) for p, w in zip(opt.param_groups[0]["params"], before, strict=True))


def small_steps(name: str, weights: Tensor, stochastic: bool) -> tuple[Tensor, float]:
    """Weights after 30 steps far below their spacing, and how far these went in all; the gradient is a constant 1."""
    p = nn.Parameter(weights.clone())
    opt = OPTIMIZERS[name].load()([p], weight_decay=0.0, stochastic_rounding=stochastic)
    way = 0.0
    for _ in range(30):
        p.grad = torch.ones_like(p)
        opt.observe(1.0)
        opt.step()
        way += opt.pulse.rate
    return p.detach(), way


@pytest.mark.parametrize("name", ["airy", "cats"])
def test_stochastic_rounding_loses_no_small_steps(name: str) -> None:
    start = torch.ones(40_000, dtype=torch.bfloat16)
    still, _ = small_steps(name, start, stochastic=False)
    assert torch.equal(still, start)
    moved, way = small_steps(name, start, stochastic=True)
    spacing = 2.0**-8  # from 1 down to the next number
    error = (30 * 0.25 * spacing**2 / start.numel()) ** 0.5
    assert 30 * 5e-5 < way < spacing
    assert abs(float(moved.double().mean()) - (1 - way)) <= 5 * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stochastic_rounding_does_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    start = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(small_steps(name, start, stochastic=True)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert not torch.equal(results[0], small_steps(name, start, stochastic=False)[0])
