"""`capture_loss=True`: the loss is read off `Tensor.backward`."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.checkpoint import checkpoint

from emomerge.errors import MissingLossError
from emomerge.optim import OPTIMIZERS, EmoCats, EmoPulse, EmoSens, EmoVoid, capture
from emomerge.optim.base import EmoOptimizer

BACKWARD, SCALE, SHARDED_SCALE = Tensor.backward, GradScaler.scale, ShardedGradScaler.scale
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X.square().sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    for left_over in list(capture._watched.values()):  # a failed test is kept alive with its optimizer
        capture.unwatch(left_over())
    yield
    if capture._watched:
        gc.collect()
    assert (Tensor.backward, GradScaler.scale, ShardedGradScaler.scale) == (BACKWARD, SCALE, SHARDED_SCALE)
    assert not capture._watched and not capture._replaced


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def mse(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return nn.functional.mse_loss(model(X[rows]), Y[rows])


def captured(opt: EmoOptimizer) -> list[float]:
    return [float(loss) for loss in opt.intake._captured]


def history(opt: EmoOptimizer, step: Callable[[], Any], steps: int = 12) -> list[tuple[float, ...]]:
    """The pulse after each step."""
    seen = []
    for _ in range(steps):
        step()
        opt.zero_grad()
        seen.append((opt.pulse.short, opt.pulse.sigma, opt.pulse.trust, opt.pulse.rate))
    return seen


@pytest.mark.parametrize("how", ["observe", "divided", "capture", "undivided observe beside capture"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_sees_the_loss_of_the_whole_batch(name: str, how: str) -> None:
    def run(micro_batches: int) -> list[tuple[float, ...]]:
        model = net()
        opt = OPTIMIZERS[name].load()(model.parameters(), capture_loss="capture" in how)

        def step() -> None:
            for rows in range(0, 32, 32 // micro_batches):
                loss = mse(model, slice(rows, rows + 32 // micro_batches))
                if "observe" in how:
                    opt.observe(loss)
                loss = loss / micro_batches
                if how == "divided":
                    opt.observe(loss, divided=True)
                loss.backward()
            opt.step()

        return history(opt, step)

    for whole, parts in zip(run(1), run(4), strict=True):
        assert parts == pytest.approx(whole, rel=1e-6, abs=1e-6)


def test_equals_a_step_with_a_closure() -> None:
    first, second = net(), net()
    opt, twin = EmoSens(first.parameters(), capture_loss=True), EmoSens(second.parameters())

    def bare() -> None:
        mse(first).backward()
        opt.step()

    def closure() -> float:
        loss = mse(second)
        loss.backward()
        return loss

    assert history(opt, bare) == history(twin, lambda: twin.step(closure))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_one_wrapper_for_all_and_none_without() -> None:
    first = EmoSens(net().parameters(), capture_loss=True)
    wrapper, scale = Tensor.backward, GradScaler.scale
    assert wrapper is not BACKWARD and scale is not SCALE and wrapper.__name__ == "backward"
    second = EmoVoid(net().parameters(), capture_loss=True)
    capture.watch(second)  # again
    EmoCats(net().parameters())
    assert Tensor.backward is wrapper and GradScaler.scale is scale
    capture.unwatch(first)
    assert Tensor.backward is wrapper
    del second
    gc.collect()
    assert Tensor.backward is BACKWARD and GradScaler.scale is SCALE and ShardedGradScaler.scale is SHARDED_SCALE
    mse(net()).backward()
    assert not captured(first)


def test_somebody_elses_wrapper_on_top_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    ours, calls = Tensor.backward, []
    monkeypatch.setattr(Tensor, "backward", lambda self, *args: (calls.append(1), ours(self, *args))[1])
    theirs = Tensor.backward
    capture.unwatch(opt)
    assert Tensor.backward is theirs
    mse(model).backward()
    assert calls == [1] and not captured(opt)
    capture.watch(opt)
    mse(model).backward()
    assert calls == [1, 1] and len(captured(opt)) == 1
    monkeypatch.undo()
    capture.unwatch(opt)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_capture_for_themselves(clone: Any) -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    mse(model).backward()
    opt.step()
    other, twin = clone((model, opt))
    mse(other).backward()
    assert len(captured(twin)) == 1 and not captured(opt)
    twin.step()
    capture.unwatch(opt)
    assert Tensor.backward is not BACKWARD


def test_loading_a_state_changes_nothing() -> None:
    model = net()
    opt, plain = EmoSens(model.parameters(), capture_loss=True), EmoSens(net().parameters())
    opt.load_state_dict(plain.state_dict())
    mse(model).backward()
    opt.step()
    plain.load_state_dict(opt.state_dict())
    assert len(capture._watched) == 1


def test_the_gradient_of_backward_counts() -> None:
    w = nn.Parameter(torch.tensor(3.0))
    opt = EmoSens([w], capture_loss=True)
    (2 * w).backward(torch.tensor(0.5))
    (2 * w).backward(gradient=torch.tensor(0.25), retain_graph=True)
    (2 * w).sum().reshape(1).backward()
    assert captured(opt) == [3.0, 1.5, 6.0]
    opt.step()
    assert opt.pulse.short == 10.5


def test_what_is_no_loss() -> None:
    w = nn.Parameter(torch.ones(2))
    opt = EmoSens([w], capture_loss=True)
    (w * 2).backward(torch.ones(2))
    torch.autograd.grad(w.sum(), w)
    torch.autograd.backward(w.sum())
    (w.sum() * 1j).backward(torch.tensor(1j))
    other = nn.Parameter(torch.ones(2))
    other.sum().backward()
    (w.sum() * other.sum()).backward(inputs=[other])
    with pytest.raises(RuntimeError):
        torch.tensor(1.0).backward()
    assert not captured(opt)
    with pytest.raises(MissingLossError, match=r"loss\.backward\(\)"):
        opt.step()


@pytest.fixture(params=["as in torch", "missing"])
def private_function(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with torch's private function that tells whether a backward pass is in progress, and without it."""
    if request.param == "missing":
        monkeypatch.setattr(capture, "_graph_task", None)  # torch itself needs it


@pytest.mark.usefixtures("private_function")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_count_once(reentrant: bool) -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    x = X.clone().requires_grad_()
    loss = checkpoint(model, x, use_reentrant=reentrant).square().mean()
    loss.backward()
    assert captured(opt) == [loss.item()]


class Rerun(torch.autograd.Function):
    """Σw²·v, whose backward computes it again and lets `Tensor.backward` reach v, as some checkpointing does."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor) -> Tensor:
        ctx.leaves = w, v
        return (w.square() * v.detach()).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        w = ctx.leaves[0].detach().requires_grad_()
        with torch.enable_grad():
            (w.square() * ctx.leaves[1]).sum().backward(grad)
        return w.grad, None


class Subclass(Tensor):
    pass


@pytest.mark.usefixtures("private_function")
def test_a_call_within_a_call_counts_once() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = EmoSens([w, v], capture_loss=True)
    Rerun.apply(w, v).backward()
    assert captured(opt) == [2.0] and v.grad is not None
    w.sum().as_subclass(Subclass).backward()
    with torch.device("cpu"):
        w.sum().backward()
    assert captured(opt) == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError):
        torch.tensor(1.0).backward()
    w.sum().backward()  # the failed call is over
    assert captured(opt) == [2.0, 2.0, 2.0, 2.0]


def test_explicit_observations_win() -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    mse(model).backward()
    opt.observe(5.0)
    opt.zero_grad()  # drops what was captured, never what was observed
    mse(model).backward()
    opt.step()
    assert opt.pulse.short == 5.0
    with pytest.raises(MissingLossError):
        opt.step()


def thrown_away() -> list[Callable[[nn.Module, EmoOptimizer], None]]:
    return [
        lambda model, opt: opt.zero_grad(),
        lambda model, opt: opt.zero_grad(set_to_none=False),
        lambda model, opt: model.zero_grad(),
    ]


@pytest.mark.parametrize("throw_away", thrown_away())
def test_losses_of_gradients_thrown_away_do_not_count(throw_away: Any) -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    (1000 * mse(model)).backward()
    throw_away(model, opt)
    loss = mse(model)
    loss.backward()
    opt.step()
    assert opt.pulse.short == pytest.approx(loss.item())


@pytest.mark.parametrize("scaler", [GradScaler, ShardedGradScaler])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler.*")
def test_a_grad_scaler_is_undone(scaler: type[GradScaler], explicit: bool) -> None:
    def run(scaler: GradScaler) -> list[tuple[float, ...]]:
        model = net()
        opt = EmoSens(model.parameters(), capture_loss=not explicit)

        def step() -> None:
            for half in (slice(16), slice(16, 32)):
                loss = mse(model, half) / 2
                if explicit:
                    opt.observe(loss, divided=True)
                scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()

        return history(opt, step)

    options: dict[str, Any] = {"init_scale": 2.0**16, "growth_interval": 2}
    if scaler is ShardedGradScaler:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        options["process_group"] = dist.group.WORLD
    try:
        scaled = run(scaler("cpu", **options))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for with_it, without in zip(scaled, run(GradScaler("cpu", enabled=False)), strict=True):
        assert with_it == pytest.approx(without, rel=1e-6, abs=1e-6)


def test_scaling_several_losses_at_once() -> None:
    a, b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    opt = EmoSens([a, b], capture_loss=True)
    for loss in GradScaler("cpu").scale([a * 1, b * 1]):
        loss.backward(torch.tensor(0.5))
    assert captured(opt) == [1.0, 1.5]
    assert not capture._unscaled or len(capture._unscaled) == 1  # only `loss` is still alive


@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_a_step_skipped_by_a_grad_scaler(owner: str) -> None:
    model = net()
    opt = EmoSens(model.parameters(), capture_loss=True)
    scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)  # the first gradients overflow
    for _ in range(2):
        loss = mse(model)
        scaler.scale(loss * 100).backward()
        scaler.step(opt)
        scaler.update()
        (opt if owner == "optimizer" else model).zero_grad()
    assert opt.pulse.steps == 1
    assert opt.pulse.short == pytest.approx(100 * loss.item())


@pytest.mark.parametrize("second", [EmoVoid, torch.optim.AdamW])
def test_each_player_of_a_gan_sees_its_own_loss(second: type[torch.optim.Optimizer]) -> None:
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    options = {"capture_loss": True} if second is EmoVoid else {}
    opt_g, opt_c = EmoSens(generator.parameters(), capture_loss=True), second(critic.parameters(), **options)
    alone_g, alone_c = EmoPulse(), EmoPulse()
    for _ in range(5):
        opt_c.zero_grad()
        real = nn.functional.softplus(-critic(X)).mean()
        real.backward()
        fake = nn.functional.softplus(critic(generator(X).detach())).mean()
        fake.backward()
        opt_c.step()
        alone_c.update(real.item() + fake.item())
        opt_g.zero_grad()
        fooled = nn.functional.softplus(-critic(generator(X))).mean()
        fooled.backward()  # leaves gradients in the critic too, which its zero_grad throws away
        opt_g.step()
        alone_g.update(fooled.item())
    assert opt_g.pulse.short == pytest.approx(alone_g.short, rel=1e-6) and opt_g.pulse.steps == 5
    if isinstance(opt_c, EmoVoid):
        assert opt_c.pulse.short == pytest.approx(alone_c.short, rel=1e-6) and opt_c.pulse.steps == 5


def test_sharded_gradients_that_arrive_with_the_last_micro_batch() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        opt = EmoSens(model.parameters(), capture_loss=True)
        losses = []
        for part in range(4):
            model.set_requires_gradient_sync(part == 3)
            loss = mse(model, slice(8 * part, 8 * part + 8)) / 4
            loss.backward()
            losses.append(loss.item())
        opt.step()
        assert opt.pulse.short == pytest.approx(sum(losses))
    finally:
        dist.destroy_process_group()


def test_nothing_waits_for_the_device() -> None:
    w = nn.Parameter(torch.empty(2, device="meta"))
    opt = EmoSens([w], capture_loss=True)
    for _ in range(2):
        GradScaler("cpu", enabled=False).scale(w.sum()).backward()
        w.sum().backward(torch.empty((), device="meta"))
    assert len(opt.intake._captured) == 4
    assert opt.intake.take(torch.device("meta")).is_meta


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    yield accelerator
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def bare_loop(accelerator: Accelerator, opt: EmoOptimizer, model: nn.Module, batches: int) -> list[float]:
    """The loop of sd-scripts, whose `optimizer.step()` is bare. Gives the losses accelerate was handed."""
    model, opt = accelerator.prepare(model, opt)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0))
    losses = []
    for batch in range(batches):
        with accelerator.accumulate(model):
            loss = mse(model, slice(batch % 4 * 8, batch % 4 * 8 + 8))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_loop(accelerator: Accelerator, name: str) -> None:
    model = net()
    opt = OPTIMIZERS[name].load()(model.parameters(), lr=1.0, capture_loss=True)
    losses, pulse = bare_loop(accelerator, opt, model, 20), EmoPulse()
    for step in range(5):
        pulse.update(sum(losses[4 * step : 4 * step + 4]) / 4)
    assert opt.pulse.steps == 5
    assert opt.pulse.short == pytest.approx(pulse.short, rel=1e-6) and opt.pulse.rate == pytest.approx(pulse.rate, rel=1e-6)


def test_accelerate_loop_without_the_opt_in(accelerator: Accelerator) -> None:
    model = net()
    with pytest.raises(MissingLossError, match=r"observe\(loss\).*closure.*EmoTrainer.*capture_loss=True"):
        bare_loop(accelerator, EmoSens(model.parameters()), model, 4)
