"""A run during training: its optimizer, metrics, checkpoints and result, independent of the loop that drives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from emomerge.checkpoints import MemoryCheckpoint, atomic, model_checkpoint, on_disk, write_checkpoint
from emomerge.errors import BadInput, NonFiniteLossError, RunFailed
from emomerge.optim import OPTIMIZERS
from emomerge.optim.base import EmoOptimizer
from emomerge.recipe import Recipe
from emomerge.training.adamw import AdamWCosine
from emomerge.training.adapt import save_adapted
from emomerge.training.average import WeightAverage
from emomerge.training.context import Context
from emomerge.training.plan import RunSpec
from emomerge.training.run_dir import RunDir, file_sizes, load_round_start, load_start
from emomerge.training.sharded import shard_like, shard_state
from emomerge.training.state import load_header, load_state, of_kind

StepHook = Callable[[RunSpec, dict[str, Any]], None]
"""Called after every step with the run and its row of metrics."""


def ignore_step(spec: RunSpec, row: dict[str, Any]) -> None:
    """Do nothing after a step."""


class Spent(NamedTuple):
    """Time spent, in seconds."""

    wall: float
    cpu: float
    """Of all threads of this process."""


class Clock:
    """Measures the time since it was created."""

    def __init__(self) -> None:
        self._started = Spent(time.perf_counter(), time.process_time())

    def read(self, shared_by: int = 1) -> Spent:
        """Return the time spent so far, divided by the number of runs that share it."""
        wall, cpu = time.perf_counter() - self._started.wall, time.process_time() - self._started.cpu
        return Spent(wall / shared_by, cpu / shared_by)


class TrainingRun:
    """Optimizer, metrics, checkpoints and result of one run. A training loop gives it losses and gradients:

        run = TrainingRun(context, spec, trained=parameters, buffers=buffers)
        while run.unfinished:
            ...                         # forward and backward pass on the rows of step run.step + 1
            run.observe(loss)           # for every micro-batch
            run.take_step(rows, clock.read())
            ...                         # zero the gradients
        run.finish(model)

    Every loop writes the same checkpoints, with tensors under the names given here.

    Args:
        context, spec: the run. A checkpoint of other inputs is not resumed.
        trained: the trained parameters by their names in the adapted model, in its order; overwritten from a checkpoint.
        buffers: buffers that layers update in training (running means), by name.
        run_dir: where the run is kept, by default `context.run_dir(spec)`.
        on_step: called after every step.

    Raises:
        BadInput: the checkpoint is damaged.
    """

    def __init__(
        self,
        context: Context,
        spec: RunSpec,
        *,
        trained: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        run_dir: RunDir | None = None,
        on_step: StepHook = ignore_step,
    ) -> None:
        self.context, self.recipe, self.spec = context, context.recipe, spec
        self.run = run = run_dir or context.run_dir(spec)
        self.inputs = context.run_inputs(spec)
        self.learnt: dict[str, Tensor] = {**trained, **buffers}
        """Parameters and buffers that training changes, by name."""
        self.optimizer = build_optimizer(list(trained.values()), context.recipe, spec)
        if isinstance(self.optimizer, EmoOptimizer):
            self.optimizer.intake.looks = False  # every loop takes a step on each loss
        self.step = 0
        """Steps taken so far."""
        self._trained = list(trained.values())
        self._buffers = list(buffers)
        self._average = self._new_average()
        self._losses: list[Tensor] = []
        self._on_step = on_step
        run.path.mkdir(parents=True, exist_ok=True)
        for leftover in run.path.glob(".tmp*"):  # written by safetensors in a process that was killed
            leftover.unlink(missing_ok=True)
        self._resume()
        run.restart_metrics(self.step)
        self._write_running()

    def begin_round(self, spec: RunSpec, on_step: StepHook) -> None:
        """Continue with the next round, as a new object that reads the checkpoint would.

        Args:
            spec: the run with the steps of the next round.
            on_step: called after every step.
        """
        self.spec, self._on_step = spec, on_step
        self._average = self._new_average()
        header = load_header(self.run.checkpoint, self.inputs)
        if header is not None and header["step"] == self.step == spec.start:
            if spec.role == "run":  # a trunk goes on with its own weights
                self._load_weights(load_round_start(self.run, spec))
        else:  # another process has trained it in the meantime
            self._resume()
            self.run.restart_metrics(self.step)
        self._write_running()

    def _new_average(self) -> WeightAverage | None:
        spec, how = self.spec, self.recipe.runs.average
        if how is None or not spec.is_last_round or not spec.is_averaged:
            return None
        return WeightAverage(how, self.learnt, spec.start, spec.end)

    def _write_running(self) -> None:
        spec = self.spec
        self.run.write_state(
            name=spec.name, role=spec.role, optimizer=spec.optimizer, seed=spec.seed, steps=spec.steps, inputs=self.inputs,
            artefact=self._used, state="running", step=self.step, error=None,
        )  # fmt: skip

    @property
    def unfinished(self) -> bool:
        """Whether this round has steps left."""
        return self.step < self.spec.end

    def observe(self, loss: Tensor) -> None:
        """Record the scalar loss of one micro-batch of the next step."""
        self._losses.append(loss.detach())

    def take_step(self, rows: Tensor, spent: Spent) -> None:
        """Take one step from the gradients in the parameters, write its metrics, and a checkpoint if one is due.

        Args:
            rows: row numbers of the last micro-batch, for the error message.
            spent: time spent on the forward and backward passes.

        Raises:
            RunFailed: the loss is NaN or infinite; names step and rows. The last good checkpoint is kept.
        """
        clock, runs = Clock(), self.recipe.runs
        read_losses([self])
        for loss in self._losses:
            self.optimizer.observe(loss)
        if (limit := self.spec.max_grad_norm(self.recipe)) is not None:
            nn.utils.clip_grad_norm_(self._trained, limit)
        if isinstance(self.optimizer, EmoOptimizer):
            self.optimizer.damping = damping(self.spec.cooldown(runs), self.step, self.spec.steps)
        try:
            self.optimizer.step()
        except NonFiniteLossError as error:
            self._fail(error, rows)
        self.step += 1
        if self._average is not None:
            self._average.update(self.step)
        own = clock.read()
        row = self._row(Spent(spent.wall + own.wall, spent.cpu + own.cpu))
        self.run.append_metrics(row)
        self._on_step(self.spec, row)
        if runs.early_stop and self.spec.role == "run" and row["should_stop"]:
            self.step = self.spec.end
        if self.step % runs.checkpoint_every == 0 or not self.unfinished:
            self._save_checkpoint()

    def _row(self, spent: Spent) -> dict[str, Any]:
        figures = self.optimizer.pulse.figures()
        if isinstance(self.optimizer, EmoOptimizer):
            figures["rate"] *= self.optimizer.damping
        losses = torch.stack(self._losses).tolist()
        self._losses.clear()
        return {**figures, "step": self.step, "loss": sum(losses) / len(losses)} | {
            "seconds": round(spent.wall, 6),
            "cpu_seconds": round(spent.cpu, 6),
        }

    def keep_snapshot(self, model: nn.Module) -> None:
        """Save the weights if the run keeps a snapshot after this step; `model` as for `finish`."""
        if self.step not in self.spec.snapshots:
            return
        device = next(iter(self.learnt.values())).device
        save_adapted(model.cpu(), self.run.snapshot(self.step), base_folder=self.context.base_folder)
        model.to(device)

    def finish(self, model: nn.Module) -> None:
        """Write the result and mark the run as done. At the end of a round before the last one, nothing is written yet.

        Args:
            model: the adapted model on the CPU, holding this run's weights under the names of `trained`.
        """
        base_folder = self.context.base_folder
        if not self.spec.is_last_round:
            self.run.write_state(state="waiting")
            return
        self.run.squared_gradients.unlink(missing_ok=True)  # left by a run of other inputs
        if self._artefact == "model" and isinstance(self.optimizer, EmoOptimizer):
            key = OPTIMIZERS[self.spec.optimizer].squared_gradients
            if key is not None:
                write_checkpoint(squared_gradients(model, self.optimizer, key), self.run.squared_gradients, force=True)
        folders = [self.run.path / self._artefact]
        save_adapted(model, folders[0], base_folder=base_folder)
        if self._average is not None:
            folders.append(self.run.path / f"{self._artefact}-average")
            copy_into(model, self._average.tensors)
            save_adapted(model, folders[1], base_folder=base_folder)
        weights = {file.name: atomic.sha256(file) for file in sorted((self.run.path / self._used).rglob("*.safetensors"))}
        rows = list(self.run.metrics())
        folders += [self.run.snapshot(step) for step in self.spec.snapshots if step <= self.step]
        self.run.write_state(
            state="done",
            sha256=weights,
            sizes={f"{f.relative_to(self.run.path)}/{name}": size for f in folders for name, size in file_sizes(f).items()},
            steps_taken=len(rows),
            seconds=sum(row["seconds"] for row in rows),
            cpu_seconds=sum(row["cpu_seconds"] for row in rows) if all("cpu_seconds" in row for row in rows) else None,
            last_loss=sum(row["loss"] for row in rows[-20:]) / max(1, len(rows[-20:])),
        )
        self.run.checkpoint.unlink(missing_ok=True)

    @property
    def _artefact(self) -> str:
        return "model" if self.recipe.adapter.kind == "full" else "adapter"

    @property
    def _used(self) -> str:
        """The folder that is merged and measured."""
        how = self.recipe.runs.average
        return f"{self._artefact}-average" if self.spec.is_averaged and how and how.use == "average" else self._artefact

    def _fail(self, error: NonFiniteLossError, rows: Tensor) -> NoReturn:
        shown = ", ".join(map(str, rows.tolist()[:8]))
        text = f"{error} at step {self.step + 1}, rows {shown}… of the training data"
        self.run.write_state(state="failed", error=text)
        raise RunFailed(f"run {self.spec.name} failed: {text}; its last good checkpoint is kept in {self.run.path}") from None

    # Checkpoints hold the tensors of weights, average and optimizer; the optimizer's scalars are in the header.

    def _save_checkpoint(self) -> None:
        state = self.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.learnt.items()}
        if self._average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.tensors.items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        header = {
            "inputs": self.inputs, "step": self.step, "buffers": self._buffers,
            "groups": state["param_groups"], "scalars": scalars,
        }  # fmt: skip
        self.run.save_checkpoint(tensors, header)
        self.run.write_state(step=self.step)

    def _resume(self) -> None:
        """Load the checkpoint; at the start of a round, its weights are replaced by those the round starts from."""
        found = load_state(self.run.checkpoint, self.inputs)
        if found is None or not self.spec.start <= found[0]["step"] <= self.spec.end:
            if self.spec.start:
                where = self.run.checkpoint
                raise BadInput("the checkpoint of the round before is missing", where=where, fix="run the same command again")
            if self.spec.role == "run" and self.recipe.runs.trunk_steps:
                self._load_weights(load_start(self.run, self.spec))
            return
        header, tensors = found
        at_round_start = self.spec.role == "run" and header["step"] == self.spec.start > 0
        weights = load_round_start(self.run, self.spec) if at_round_start else of_kind(tensors, "model")
        state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["scalars"].items()}
        for name, tensor in of_kind(tensors, "optimizer").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self._load_weights(weights)
        self.optimizer.load_state_dict({"state": shard_state(self.optimizer, state), "param_groups": header["groups"]})
        if self._average is not None:
            self._average.load(of_kind(tensors, "average"))
        self.step = int(header["step"])

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.learnt.items():
                tensor.copy_(shard_like(weights[name], tensor))


def read_losses(runs: Iterable[TrainingRun]) -> None:
    """Move the observed losses of some runs to the host: the only time that a step waits for the device.

    Before any run's update is launched; the updates and the next forward pass then follow without waiting.
    """
    waiting = [run for run in runs if not all(loss.is_cpu for loss in run._losses)]
    if waiting:
        losses = iter(torch.stack([loss for run in waiting for loss in run._losses]).cpu().unbind())
        for run in waiting:
            run._losses = [next(losses) for _ in run._losses]


def damping(cooldown: float, step: int, steps: int) -> float:
    """Return the rate's factor after `step` of `steps` steps: 1, then linear to 0 over the last fraction `cooldown` of them."""
    return min(1.0, (steps - step) / (cooldown * steps)) if cooldown else 1.0


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names."""
    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def build_optimizer(parameters: list[nn.Parameter], recipe: Recipe, spec: RunSpec) -> EmoOptimizer | AdamWCosine:
    """Return the run's optimizer with the recipe's options."""
    runs, name = recipe.runs, spec.optimizer
    if spec.rate is not None:
        return AdamWCosine(parameters, lr=spec.rate, steps=spec.steps, weight_decay=recipe.rival.weight_decay)
    entry = OPTIMIZERS[name]
    return entry.load()(
        parameters,
        lr=runs.lr_of(name),
        weight_decay=runs.weight_decay,
        preset=runs.preset,
        use_shadow=runs.use_shadow,
        **{option: getattr(runs, option) for option in entry.options},
    )


def squared_gradients(model: nn.Module, optimizer: EmoOptimizer, key: str) -> MemoryCheckpoint:
    """Return v/(1 − β₂ˢ) of every floating-point tensor under its name on disk: F of the merge method `fisher`.

    v is the optimizer's state `key`; tensors that were not trained are zero. For full fine-tunes only: an adapter's v belongs
    to its factors.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    learnt: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        unbiased = 1 - group["betas"][1] ** optimizer.pulse.steps
        learnt |= {p: optimizer.state[p][key] / unbiased for p in group["params"] if p in optimizer.state}
    found = on_disk(model, {name: learnt[p] for name, p in parameters.items() if p in learnt})
    weights = model_checkpoint(model, source="F")
    floating = [name for name in weights if weights[name].is_floating_point()]
    return MemoryCheckpoint({name: found.get(name, torch.zeros_like(weights[name])).cpu() for name in floating}, source="F")
