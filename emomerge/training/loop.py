"""Training a single run: its forward and backward passes, from the base to the written result."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.recipe import Recipe, Runs
from emomerge.training.adapt import adapt
from emomerge.training.context import Context
from emomerge.training.order import BatchOrder
from emomerge.training.plan import RunSpec
from emomerge.training.run import Clock, StepHook, TrainingRun, ignore_step


def train_run(context: Context, spec: RunSpec, on_step: StepHook = ignore_step, model: nn.Module | None = None) -> nn.Module:
    """Train one run to the end of its round. A checkpoint of the same inputs is resumed bit-identically.

    Args:
        context, spec: the run.
        on_step: called after every step.
        model: an adapted model returned by an earlier call for a run of this recipe. It saves loading the base again, and is
            used only if the run starts from weights on disk, not from the adapter's initialization.

    Returns:
        the adapted model on the CPU, with the weights of the run.

    Raises:
        RunFailed: the loss became NaN or infinite; names step and rows. The last good checkpoint is kept.
    """
    runs, task, device, split = context.recipe.runs, context.task, context.device, context.data.train
    if model is None or spec.start == 0:
        model = adapted_model(context, spec)
    model.to(device).train()
    run = TrainingRun(context, spec, trained=trained(model), buffers=buffers(model), on_step=on_step)
    order = batch_order(runs, spec, len(split))
    run.keep_snapshot(model)  # in case of a kill between checkpoint and snapshot
    with torch.random.fork_rng():
        while run.unfinished:
            clock = Clock()
            for micro in micro_batches(runs, spec, run.step):
                seed_default_generators(seed_of("dropout", spec.seed, micro), device)
                rows = order.batch(micro)
                batch = {key: value.to(device, non_blocking=True) for key, value in split.batch(rows).items()}
                with autocast(device, runs.precision):
                    loss = task.loss(model, batch)
                (loss / spec.micro_batches(runs)).backward()
                run.observe(loss)
            run.take_step(rows, clock.read())
            model.zero_grad(set_to_none=True)
            run.keep_snapshot(model)
    run.finish(model.cpu())
    return model


def adapted_model(context: Context, spec: RunSpec) -> nn.Module:
    """Return the base on the CPU with the parameters to train, as every run of the training seed starts without a trunk."""
    return adapt_model(context, spec, context.base_folder)


def adapt_model(context: Context, spec: RunSpec, folder: Path) -> nn.Module:
    """Return the model of a folder on the CPU with the parameters to train."""
    recipe, task = context.recipe, context.task
    model = task.reload_model(folder, trust_remote_code=recipe.base.trust_remote_code)
    return adapt(model, recipe.adapter, task_type=task.peft_task_type, head=fresh_head(recipe, model), seed=spec.seed)


def initial_weights(context: Context, spec: RunSpec) -> dict[str, Tensor]:
    """Return the trainable parameters of a run before its first step, by name."""
    return {name: p.detach() for name, p in trained(adapted_model(context, spec)).items()}


def fresh_head(recipe: Recipe, model: nn.Module) -> str | None:
    """Return the name of the classification head that is trained in full beside the adapter, if there is one.

    The head of a base given by `base.model` is freshly initialized; that of a prepared base is trained and gets an adapter
    like any other layer.
    """
    if recipe.base.model is None:
        return None
    return next((name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)), None)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers, by name. Layers may update them in training (running means)."""
    kept = set(model.state_dict())
    return {name: b for name, b in model.named_buffers() if name in kept}


def batch_order(runs: Runs, spec: RunSpec, rows: int) -> BatchOrder:
    """Return the order in which a run sees the rows of the training split."""
    return BatchOrder(rows, runs.batch_size, *order_key(runs, spec))


def order_key(runs: Runs, spec: RunSpec) -> tuple[object, ...]:
    """Return the key of a run's batch order: runs with equal keys see the same batches."""
    if spec.is_trunk:
        return (spec.seed, "trunk")
    key = (spec.seed,) if runs.data_order == "same" else (spec.seed, spec.optimizer)
    return (*key, *([f"member {spec.member}"] if spec.member else []))


def micro_batches(runs: Runs, spec: RunSpec, step: int) -> range:
    """Return the indices of the micro-batches of the step after `step` steps."""
    count = spec.micro_batches(runs)
    return range(step * count, (step + 1) * count)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the forward pass runs in the recipe's precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
