"""Runs one after the other: the forward and backward passes of each, from the base to its artefact."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.recipe import Recipe, Runs
from emomerge.tasks import Task, TaskData
from emomerge.training.adapt import adapt
from emomerge.training.live import StepHook, TrainingRun
from emomerge.training.order import BatchOrder
from emomerge.training.runs import RunDir, RunSpec


def train_run(
    recipe: Recipe,
    spec: RunSpec,
    run: RunDir,
    inputs: str,
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    on_step: StepHook = lambda spec, row: None,
) -> None:
    """Train one run to the end of its round, from its last checkpoint if it has one of the same inputs, to the same bits.

    Raises:
        RunFailed: the loss became NaN or infinite; names step and rows. The last good checkpoint stays.
    """
    model = adapted_model(recipe, spec, task, base_folder)
    model.to(device).train()
    live = TrainingRun(recipe, spec, run, inputs, trained=trained(model), buffers=buffers(model), on_step=on_step)
    order = batch_order(recipe.runs, spec, len(data.train))
    live.keep_snapshot(model, base_folder)  # a kill may have come between checkpoint and snapshot
    with torch.random.fork_rng():
        while live.unfinished:
            started = time.perf_counter()
            for micro in micro_batches(recipe.runs, live.step):
                seed_default_generators(seed_of("dropout", spec.seed, micro), device)
                rows = order.batch(micro)
                batch = {key: value.to(device, non_blocking=True) for key, value in data.train.batch(rows).items()}
                with autocast(device, recipe.runs.precision):
                    loss = task.loss(model, batch)
                (loss / recipe.runs.accumulation).backward()
                live.observe(loss)
            live.take_step(rows, time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
            live.keep_snapshot(model, base_folder)
    live.finish(model.cpu(), base_folder)


def adapted_model(recipe: Recipe, spec: RunSpec, task: Task, base_folder: Path) -> nn.Module:
    """The base with what the run trains marked in it, on the CPU, as every run of the training seed starts."""
    model = task.reload_model(base_folder, trust_remote_code=recipe.base.trust_remote_code)
    return adapt(model, recipe.adapter, task_type=task.peft_task_type, head=fresh_head(recipe, model), seed=spec.seed)


def initial_weights(recipe: Recipe, spec: RunSpec, task: Task, base_folder: Path) -> dict[str, Tensor]:
    """What a run trains before its first step, by name."""
    return {name: p.detach() for name, p in trained(adapted_model(recipe, spec, task, base_folder)).items()}


def fresh_head(recipe: Recipe, model: nn.Module) -> str | None:
    """The classifier of a given base, which the task has just made or may have renamed: trained whole beside the adapter.

    A prepared base has learnt its own, which the adapter adapts like any other layer.
    """
    if recipe.base.model is None:
        return None
    return next((name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)), None)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the weights, by name: layers may update them on the way (running means)."""
    kept = set(model.state_dict())
    return {name: b for name, b in model.named_buffers() if name in kept}


def batch_order(runs: Runs, spec: RunSpec, rows: int) -> BatchOrder:
    """Which rows of the training split a run sees."""
    return BatchOrder(rows, runs.batch_size, *order_key(runs, spec))


def order_key(runs: Runs, spec: RunSpec) -> tuple[object, ...]:
    """What a run's rows depend on: runs of equal keys see the same."""
    key = (spec.seed,) if runs.data_order == "same" else (spec.seed, spec.optimizer)
    return (*key, *([f"member {spec.member}"] if spec.member else []))


def micro_batches(runs: Runs, step: int) -> range:
    """Numbers of the micro-batches of the step after `step` steps."""
    return range(step * runs.accumulation, (step + 1) * runs.accumulation)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The forward pass in the recipe's precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
