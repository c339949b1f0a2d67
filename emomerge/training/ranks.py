"""Training one run in several processes started by torchrun or accelerate launch: each takes its rows of every batch.

The first rank does everything else as if it were alone. It announces each run to the other ranks, which take the steps with it,
and then finishes the run from the last checkpoint, which does not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emomerge.errors import RunFailed
from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.recipe import Recipe
from emomerge.tasks import Task, TaskData
from emomerge.training.context import Job
from emomerge.training.loop import adapted_model, autocast, batch_order, buffers, micro_batches, trained
from emomerge.training.run import Clock, StepHook, TrainingRun, copy_into, ignore_step
from emomerge.training.run_dir import RunDir
from emomerge.training.sharded import unshard


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes that train together."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this rank decides and writes."""
        return self.rank == 0

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the batch size of all ranks together."""
        runs = recipe.runs.model_copy(update={"batch_size": recipe.runs.batch_size * self.size})
        return recipe.model_copy(update={"runs": runs})

    def share(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of a batch."""
        return rows.view(self.size, -1)[self.rank]

    def mean(self, loss: Tensor) -> Tensor:
        """Return the detached mean over all ranks."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def announce(self, job: Job | None) -> None:
        """Send the next run to all other ranks; None ends their work."""
        dist.broadcast_object_list([job], src=0)

    def leave(self) -> NoReturn:
        """End this process without running destructors of torch's threads, which may hang."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def announced(self) -> Iterator[Job]:
        """Yield the runs that the first rank announces, until it announces None."""
        while True:
            received: list[Job | None] = [None]
            dist.broadcast_object_list(received, src=0)
            if received[0] is None:
                return
            yield received[0]


def join_ranks() -> Ranks | None:
    """Join the process group described by the environment variables; None if this process is alone."""
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
    """A run directory for all ranks but the first: writes do nothing."""

    def write_state(self, **fields: Any) -> None:
        """Do nothing."""

    def save_checkpoint(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Take part in gathering sharded tensors, and write nothing."""
        for tensor in tensors.values():
            unshard(tensor)

    def restart_metrics(self, after_step: int) -> None:
        """Do nothing."""

    def append_metrics(self, row: Any) -> None:
        """Do nothing."""


def follow(ranks: Ranks, task: Task, data: Callable[[], TaskData]) -> None:
    """Take the steps of every run that the first rank announces, with this rank's own task and data."""
    for job in ranks.announced():
        with contextlib.suppress(RunFailed):  # reported by the first rank
            take_steps(ranks, Job(job.context.using(task, data()), job.spec))


def take_steps(ranks: Ranks, job: Job, on_step: StepHook = ignore_step) -> None:
    """Take all steps of a run together with the other ranks; the first rank writes a checkpoint of the last step.

    Args:
        ranks: this process's place among the ranks.
        job: the run; the recipe has the batch size of all ranks together (see `Ranks.recipe`).
        on_step: called after every step.

    Raises:
        RunFailed: on every rank, if the loss becomes NaN or infinite.
    """
    context, spec = job.context, job.spec
    runs, device, split = context.recipe.runs, context.device, context.data.train
    model = adapted_model(context, spec).to(device).train()
    parallel = _parallelize(model, runs.sharding, device)
    where = context.run_dir(spec) if ranks.leads else SilentRunDir(context.run_dir(spec).path)
    run = TrainingRun(context, spec, trained=trained(model), buffers=buffers(model), run_dir=where, on_step=on_step)
    order = batch_order(runs, spec, len(split))
    with torch.random.fork_rng():
        while run.unfinished:
            clock = Clock()
            for micro in micro_batches(runs, spec, run.step):
                seed_default_generators(seed_of("dropout", spec.seed, micro, *[ranks.rank] * (not ranks.leads)), device)
                rows = order.batch(micro)
                batch = {key: value.to(device) for key, value in split.batch(ranks.share(rows)).items()}
                with autocast(device, runs.precision):
                    loss = context.task.loss(parallel, batch)
                (loss / spec.micro_batches(runs)).backward()
                run.observe(ranks.mean(loss))
            run.take_step(rows, clock.read())
            parallel.zero_grad(set_to_none=True)
            if run.step in spec.snapshots:
                tensors = {name: unshard(tensor) for name, tensor in run.learnt.items()}
                if ranks.leads:
                    unsharded = adapted_model(context, spec)
                    copy_into(unsharded, tensors)
                    run.keep_snapshot(unsharded)


def _parallelize(model: nn.Module, sharding: str, device: torch.device) -> nn.Module:
    """Return the model with gradients averaged over the ranks: replicated (DDP), or sharded layer by layer (FSDP2)."""
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
