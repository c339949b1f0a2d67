"""Two processes with different data: DDP and FSDP2 on gloo. One launch runs every case; the tests read what it left."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from emomerge.errors import NonFiniteLossError
from emomerge.optim import OPTIMIZERS, EmoPulse, intake
from emomerge.optim.base import EmoOptimizer

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in OPTIMIZERS} | {
    "airy, magnitude": ("airy", {"sign": False, "use_shadow": True}),
    "tion, l1": ("tion", {"geometry": "l1", "use_shadow": True}),
    "void, l1": ("void", {"geometry": "l1", "use_shadow": True}),
}
STEPS = {variant: 200 if variant in OPTIMIZERS else 20 for variant in VARIANTS}
FEW = 6


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows of 6, which two ranks share evenly, of 3, which they do not, and of 1, of which one rank has nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)
    ).to(dtype)


def sharded(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    net = model(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)), **options)
    return net


def build(variant: str, net: nn.Module, **more: Any) -> EmoOptimizer:
    name, options = VARIANTS[variant]
    return OPTIMIZERS[name].load()(net.parameters(), lr=3.0, **options, **more)


def train(net: nn.Module, opt: EmoOptimizer, start: int, stop: int) -> list[float]:
    """The losses of this rank, whose data are its own."""
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(8, 4, generator=generator)
        dtype = next(net.parameters()).dtype
        loss = nn.functional.mse_loss(net(x.to(dtype)).float(), x.square().sum(1, keepdim=True))
        opt.zero_grad()
        loss.backward()
        opt.observe(loss)  # fp32: rounding in a float64 model must not reach the pulse, where it decides between branches
        opt.step()
        losses.append(loss.item())
    return losses


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def local(t: Tensor) -> Tensor:
    return (t.to_local() if hasattr(t, "to_local") else t).detach().clone()


def snapshot(net: nn.Module, opt: EmoOptimizer, view: Any = full) -> dict[str, Any]:
    weights = {name: view(p) for name, p in net.named_parameters()}
    state = {f"{name} {key}": view(t) for name, p in net.named_parameters() for key, t in opt.state.get(p, {}).items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return {"tensors": weights | state, "groups": groups}


def run_variant(variant: str, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    steps = STEPS[variant]
    net = model(torch.float64)
    opt = build(variant, net)
    seen["losses"] = train(DistributedDataParallel(net), opt, 0, steps)
    seen["whole"] = snapshot(net, opt)
    net = sharded(torch.float64)
    opt = build(variant, net)
    train(net, opt, 0, FEW)
    checkpoint = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, opt)}
    dcp.save(checkpoint, checkpoint_id=folder / variant)
    train(net, opt, FEW, 2 * FEW)
    seen["uncut"] = snapshot(net, opt, local)
    train(net, opt, 2 * FEW, steps)
    seen["sharded"] = snapshot(net, opt)

    net = sharded(torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    opt = build(variant, net)
    loaded = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, opt)}
    dcp.load(loaded, checkpoint_id=folder / variant)
    net.load_state_dict(loaded["model"])
    set_optimizer_state_dict(net, opt, loaded["optim"])
    train(net, opt, FEW, 2 * FEW)
    seen["resumed"] = snapshot(net, opt, local)

    net = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    opt = build(variant, net)
    train(net, opt, 0, FEW)
    seen["mixed precision"] = snapshot(net, opt)
    net = sharded(torch.bfloat16)
    opt = build(variant, net, stochastic_rounding=True)
    train(net, opt, 0, FEW)
    seen["bfloat16"] = snapshot(net, opt)
    return seen


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen: dict[str, Any] = {variant: run_variant(variant, Path(folder)) for variant in VARIANTS}

    net = model()
    opt = build("sens", net)
    train(DistributedDataParallel(net), opt, 0, 5)
    before = snapshot(net, opt)
    opt.observe(math.nan if rank else 1.0)
    try:
        opt.step()
    except NonFiniteLossError:
        seen["refused"] = {"before": before, "after": snapshot(net, opt)}

    intake.dist.all_reduce = lambda mean: mean.mul_(2)  # from here on every rank for itself
    net = model()
    opt = build("sens", net)
    train(DistributedDataParallel(net), opt, 0, STEPS["sens"])
    seen["alone"] = snapshot(net, opt)
    torch.save(seen, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # without the destructors of torch's threads, which may abort


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def text(snapshot: dict[str, Any]) -> str:
    """Every bit of it."""
    return json.dumps([snapshot["groups"], {name: [str(t.dtype), t.tolist()] for name, t in snapshot["tensors"].items()}])


@pytest.mark.parametrize("how", ["whole", "sharded", "mixed precision", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_stay_alike(ranks: list[dict[str, Any]], variant: str, how: str) -> None:
    first, second = (seen[variant][how] for seen in ranks)
    assert text(first) == text(second)
    weights = first["tensors"]["0.weight"]
    assert not torch.equal(weights, model(weights.dtype)[0].weight)
    assert all(t.isfinite().all() for t in first["tensors"].values())


def test_ranks_that_see_their_own_loss_drift_apart(ranks: list[dict[str, Any]]) -> None:
    first, second = (seen["alone"]["tensors"]["0.weight"] for seen in ranks)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pulse_sees_the_mean_loss(ranks: list[dict[str, Any]], variant: str) -> None:
    first, second = (seen[variant]["losses"] for seen in ranks)
    assert first != second
    alone = EmoPulse(scope=3.0)
    for pair in zip(first, second, strict=True):
        alone.update(sum(pair) / 2)
    group = ranks[0][variant]["whole"]["groups"][0]
    assert {name: group[f"pulse_{name}"] for name in alone.state_dict()} == alone.state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_equals_whole(ranks: list[dict[str, Any]], variant: str) -> None:
    whole, parts = ranks[0][variant]["whole"], ranks[0][variant]["sharded"]
    assert whole["tensors"].keys() == parts["tensors"].keys()
    for name, t in whole["tensors"].items():
        torch.testing.assert_close(parts["tensors"][name], t, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert parts["groups"][0].pop("l1", 0.0) == pytest.approx(whole["groups"][0].pop("l1", 0.0), rel=1e-9)
    assert parts["groups"] == whole["groups"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_state_resumes_bit_identically(ranks: list[dict[str, Any]], variant: str, rank: int) -> None:
    seen = ranks[rank][variant]
    assert text(seen["resumed"]) == text(seen["uncut"])


def test_a_non_finite_loss_on_one_rank_stops_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert text(seen["refused"]["after"]) == text(seen["refused"]["before"])
