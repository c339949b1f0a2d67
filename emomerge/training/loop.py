"""One shallow run, from the base to its artefact, resumable at every checkpoint with bit-identical continuation."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emomerge.checkpoints import MemoryCheckpoint, atomic, disk_names, model_checkpoint, write_checkpoint
from emomerge.errors import BadInput, NonFiniteLossError, RunFailed
from emomerge.optim import OPTIMIZERS, EmoSens
from emomerge.optim.base import EmoOptimizer
from emomerge.recipe import Recipe, Runs
from emomerge.tasks import Task, TaskData
from emomerge.training.adapt import adapt, save_adapted
from emomerge.training.order import BatchOrder, seed_of
from emomerge.training.runs import RunDir, RunSpec, file_sizes

StepHook = Callable[[RunSpec, dict[str, Any]], None]
"""Called after every step with the run and its row of metrics."""


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
    """Train one run to its end, from its last checkpoint if it has one of the same inputs.

    Raises:
        RunFailed: the loss became NaN or infinite; names step and rows. The last good checkpoint stays.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    model = task.reload_model(base_folder, trust_remote_code=recipe.base.trust_remote_code)
    model = adapt(model, recipe.adapter, task_type=task.peft_task_type, head=fresh_head(recipe, model), seed=spec.seed)
    model.to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(list(trained.values()), recipe.runs, spec.optimizer)
    step = _resume(run, inputs, model, optimizer)
    run.restart_metrics(step)
    artefact = "model" if recipe.adapter.kind == "full" else "adapter"
    run.write_state(
        name=spec.name, role=spec.role, optimizer=spec.optimizer, seed=spec.seed, steps=spec.steps, inputs=inputs,
        artefact=artefact, state="running", step=step, error=None,
    )  # fmt: skip
    steps = _steps(recipe.runs, spec, step, model=model, optimizer=optimizer, task=task, data=data, device=device)
    try:
        with torch.random.fork_rng():
            for row in steps:
                run.append_metrics(row)
                on_step(spec, row)
                if row["step"] % recipe.runs.checkpoint_every == 0 or row["step"] == spec.steps:
                    _save_checkpoint(run, inputs, row["step"], model, optimizer)
    except NonFiniteLossError as error:
        run.write_state(state="failed", error=str(error))
        raise RunFailed(f"run {spec.name} failed: {error}; its last good checkpoint is kept in {run.path}") from None
    run.squared_gradients.unlink(missing_ok=True)  # of a run of other inputs
    if isinstance(optimizer, EmoSens) and artefact == "model":
        write_checkpoint(squared_gradients(model, optimizer, spec.steps), run.squared_gradients, force=True)
    _finish(run, model, artefact, base_folder)


def fresh_head(recipe: Recipe, model: nn.Module) -> str | None:
    """The classifier of a given base, which the task has just made or may have renamed: trained whole beside the adapter.

    A prepared base has learnt its own, which the adapter adapts like any other layer.
    """
    if recipe.base.model is None:
        return None
    return next((name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)), None)


def build_optimizer(parameters: list[nn.Parameter], runs: Runs, name: str) -> EmoOptimizer:
    """One optimizer of the family as the recipe asks for it."""
    options: dict[str, Any] = {"geometry": runs.geometry} if name in ("tion", "void") else {}
    return OPTIMIZERS[name](
        parameters,
        lr=runs.lr,
        weight_decay=runs.weight_decay,
        preset=runs.preset,
        use_shadow=runs.use_shadow,
        **options,
    )


def _steps(
    runs: Runs,
    spec: RunSpec,
    done: int,
    *,
    model: nn.Module,
    optimizer: EmoOptimizer,
    task: Task,
    data: TaskData,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Take the steps after `done`, yielding each one's metrics."""
    order_key = (spec.seed,) if runs.data_order == "same" else (spec.seed, spec.optimizer)
    order = BatchOrder(len(data.train), runs.batch_size, *order_key)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in range(done + 1, spec.steps + 1):
        started = time.perf_counter()
        losses = []
        for micro in range((step - 1) * runs.accumulation, step * runs.accumulation):
            torch.manual_seed(seed_of("dropout", spec.seed, micro))
            rows = order.batch(micro)
            batch = {key: value.to(device, non_blocking=True) for key, value in data.train.batch(rows).items()}
            with _autocast(device, runs.precision):
                loss = task.loss(model, batch)
            (loss / runs.accumulation).backward()
            optimizer.observe(loss)
            losses.append(loss.detach())
        if runs.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, runs.max_grad_norm)
        try:
            optimizer.step()
        except NonFiniteLossError as error:
            shown = ", ".join(map(str, rows.tolist()[:8]))
            raise NonFiniteLossError(f"{error} at step {step}, rows {shown}… of the training data") from None
        optimizer.zero_grad(set_to_none=True)
        yield _metrics(step, losses, optimizer, time.perf_counter() - started)


def _metrics(step: int, losses: list[Tensor], optimizer: EmoOptimizer, seconds: float) -> dict[str, Any]:
    loss = float(torch.stack(losses).mean())
    return {**optimizer.pulse.figures(), "step": step, "loss": loss, "seconds": round(seconds, 6)}


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# Checkpoints: one safetensors file (weights, optimizer tensors; scalars as JSON in its metadata), replaced whole.


def _save_checkpoint(run: RunDir, inputs: str, step: int, model: nn.Module, optimizer: EmoOptimizer) -> None:
    state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in _learnt(model).items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    header = {"inputs": inputs, "step": step, "groups": state["param_groups"], "scalars": scalars}
    with atomic.translate_os_error(run.checkpoint), atomic.new_path(run.checkpoint, force=True) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(header)})
    run.write_state(step=step)


def _resume(run: RunDir, inputs: str, model: nn.Module, optimizer: EmoOptimizer) -> int:
    """Load the run's checkpoint and return its step; 0 where there is none for these inputs."""
    if not run.checkpoint.exists():
        return 0
    try:
        with safe_open(run.checkpoint, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors raises its own type, which says nothing of the file
        raise BadInput(
            "the run's checkpoint cannot be read",
            where=run.checkpoint,
            found=error,
            fix="delete it to train this run anew",
        ) from None
    if header["inputs"] != inputs:
        return 0
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["scalars"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    with torch.no_grad():
        for name, tensor in _learnt(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})
    return int(header["step"])


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes: trained parameters, and buffers that layers update on the way (running means)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = set(model.state_dict())
    return {**parameters, **{name: b for name, b in model.named_buffers() if name in kept}}


def squared_gradients(model: nn.Module, optimizer: EmoSens, steps: int) -> MemoryCheckpoint:
    """v/(1 − β₂ˢ) of every floating tensor under its name on disk, zero where nothing was learnt: F of the method `fisher`.

    An adapter's v is that of its factors, which says nothing of the weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    learnt: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        unbiased = 1 - group["betas"][1] ** steps
        learnt |= {p: optimizer.state[p]["v"] / unbiased for p in group["params"] if p in optimizer.state}
    found = {
        on_disk: learnt[p]
        for name, on_disk in disk_names(model).items()
        if (p := parameters.get(name)) is not None and p in learnt
    }
    weights = model_checkpoint(model, source="F")
    floating = [name for name in weights if weights[name].is_floating_point()]
    return MemoryCheckpoint({name: found.get(name, torch.zeros_like(weights[name])).cpu() for name in floating}, source="F")


def _finish(run: RunDir, model: nn.Module, artefact: str, base_folder: Path) -> None:
    folder = run.path / artefact
    save_adapted(model.cpu(), folder, base_folder=base_folder)
    rows = list(run.metrics())
    weights = {file.name: atomic.sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
    run.write_state(
        state="done",
        sha256=weights,
        sizes={f"{artefact}/{name}": size for name, size in file_sizes(folder).items()},
        seconds=sum(row["seconds"] for row in rows),
        last_loss=sum(row["loss"] for row in rows[-20:]) / max(1, len(rows[-20:])),
    )
    run.checkpoint.unlink(missing_ok=True)
