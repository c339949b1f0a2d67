"""One run on several processes, which torchrun or accelerate launch started: each takes its rows of every batch.

The first rank does everything else as if it were alone: it announces each run to the others, which take the steps with it, and
then finishes the run from the last checkpoint, which does not tell how many took the steps.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emomerge.errors import RunFailed
from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.recipe import Recipe
from emomerge.tasks import Task, TaskData
from emomerge.training.live import StepHook, TrainingRun, put
from emomerge.training.loop import adapted_model, autocast, batch_order, buffers, micro_batches, trained
from emomerge.training.runs import RunDir, RunSpec
from emomerge.training.sharded import whole


@dataclass(frozen=True)
class Announcement:
    """A run that all ranks are to train."""

    spec: RunSpec
    run: Path
    inputs: str
    base_folder: Path


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.rank == 0

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe of one process with as many rows a batch as all ranks have together."""
        runs = recipe.runs.model_copy(update={"batch_size": recipe.runs.batch_size * self.size})
        return recipe.model_copy(update={"runs": runs})

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows of a batch."""
        return rows.view(self.size, -1)[self.rank]

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over all ranks, without a gradient."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def announce(self, announcement: Announcement | None) -> None:
        """Tell all other ranks what comes next; None if nothing does."""
        dist.broadcast_object_list([announcement], src=0)

    def leave(self) -> NoReturn:
        """End this process, without the destructors of torch's threads, which may hang."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def announced(self) -> Iterator[Announcement]:
        """What the first rank announces, until it is nothing any more."""
        while True:
            heard: list[Announcement | None] = [None]
            dist.broadcast_object_list(heard, src=0)
            if heard[0] is None:
                return
            yield heard[0]


def join_ranks() -> Ranks | None:
    """Meet the processes started together with this one, as environment variables tell; None if it is alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return None
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # others wait while the first one merges and probes
    return Ranks(dist.get_rank(), size)


class SilentRunDir(RunDir):
    """A run directory as all ranks but the first have it: to be read."""

    def write_state(self, **fields: Any) -> None:
        """Leave it as it is."""

    def save_checkpoint(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Leave it as it is, but take part in gathering what is cut."""
        for tensor in tensors.values():
            whole(tensor)

    def restart_metrics(self, after_step: int) -> None:
        """Leave them as they are."""

    def append_metrics(self, row: Any) -> None:
        """Leave them as they are."""


def follow(ranks: Ranks, recipe: Recipe, *, task: Task, data: Callable[[], TaskData], device: torch.device) -> None:
    """What all ranks but the first do: take the steps of every run that is announced."""
    for announced in ranks.announced():
        with contextlib.suppress(RunFailed):  # the first rank says so
            take_steps(ranks, recipe, announced, task=task, data=data(), device=device)


def take_steps(
    ranks: Ranks,
    recipe: Recipe,
    announced: Announcement,
    *,
    task: Task,
    data: TaskData,
    device: torch.device,
    on_step: StepHook = lambda spec, row: None,
) -> None:
    """Take all steps of a run, on every rank; the first one leaves a checkpoint of the last step.

    Args:
        recipe: with the batch size of all ranks together; see `Ranks.recipe`.
        on_step: of the first rank.

    Raises:
        RunFailed: on every rank, if the loss became NaN or infinite.
    """
    spec, runs = announced.spec, recipe.runs
    model = adapted_model(recipe, spec, task, announced.base_folder).to(device).train()
    shared = _share(model, runs.sharding, device)
    run = RunDir(announced.run) if ranks.leads else SilentRunDir(announced.run)
    live = TrainingRun(recipe, spec, run, announced.inputs, trained=trained(model), buffers=buffers(model), on_step=on_step)
    order = batch_order(runs, spec, len(data.train))
    with torch.random.fork_rng():
        while live.unfinished:
            started = time.perf_counter()
            for micro in micro_batches(runs, live.step):
                seed_default_generators(seed_of("dropout", spec.seed, micro, *[ranks.rank] * (not ranks.leads)), device)
                rows = order.batch(micro)
                batch = {key: value.to(device) for key, value in data.train.batch(ranks.share(rows)).items()}
                with autocast(device, runs.precision):
                    loss = task.loss(shared, batch)
                (loss / runs.accumulation).backward()
                live.observe(ranks.mean(loss))
            live.take_step(rows, time.perf_counter() - started)
            shared.zero_grad(set_to_none=True)
            if live.step in spec.snapshots:
                tensors = {name: whole(tensor) for name, tensor in live.learnt.items()}
                if ranks.leads:
                    alone = adapted_model(recipe, spec, task, announced.base_folder)
                    put(alone, tensors)
                    live.keep_snapshot(alone, announced.base_folder)


def _share(model: nn.Module, sharding: str, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over the ranks: copied to each, or cut over them layer by layer."""
    if sharding == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
