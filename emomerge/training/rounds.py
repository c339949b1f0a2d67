"""Training in rounds: after each round, all runs of a training seed continue from their mean, each with its own optimizer.

One file per training seed, `meeting-<seed>.safetensors` beside the run directories, holds the weights that the next round
starts from and the outer momentum; it is replaced atomically after each round. Optimizer states are in the runs' own
checkpoints. A kill at any moment therefore leaves everything that is needed to resume. The plain means of `runs.keep_rounds`
rounds, before outer momentum, are kept as checkpoints (see `training.kept`); the last one is the mean of the finished runs.

LoRA runs are averaged factor by factor, mean(A) and mean(B), as in FedIT (Zhang et al. 2024). This keeps the adapter's form and
the optimizers' states valid. It differs from mean(B·A) by the covariance of the factors over the runs, which shrinks with the
number of rounds: by 53 % of its norm after one round of 300 steps, 11 % with six rounds, 3 % with fifteen. Starting from
mean(B·A) truncated to the rank was as good with three and six rounds and worse with fifteen (`benchmarks/lora_meetings.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from emomerge.checkpoints import working_dtype
from emomerge.errors import BadInput, RunFailed
from emomerge.numerics.hashing import digest
from emomerge.recipe import Outer
from emomerge.training.adapt import save_adapted
from emomerge.training.context import Context
from emomerge.training.early_ends import Execute, Overfits, train_until_overfitted
from emomerge.training.kept import KeptRounds, mean_tensors, write_mean
from emomerge.training.loop import adapted_model, initial_weights
from emomerge.training.plan import RunSpec, planned_trunks, round_ends
from emomerge.training.run import copy_into
from emomerge.training.run_dir import load_start, round_start_file
from emomerge.training.state import load_header, load_state, of_kind, save_state
from emomerge.training.trunk import Choose, branch_point, last_snapshot, train_trunks

Tensors = dict[str, Tensor]


def train_runs(
    context: Context,
    specs: Sequence[RunSpec],
    execute: Execute,
    choose: Choose = last_snapshot,
    overfits: Overfits | None = None,
) -> None:
    """Train runs, from a trunk and in rounds if the recipe asks for them. Runs that are done are skipped.

    Args:
        context: the recipe and its folders.
        specs: all runs of one or more training seeds, or controls, which are trained without rounds.
        execute: trains the given runs from `spec.start` to `spec.end`, unless they have reached it.
        choose: chooses where the runs branch off from the trunk.
        overfits: says where a trunk, or a control with `ends_early`, need not go on.

    Raises:
        RunFailed: a loss became NaN or infinite; raised after all other runs are trained. The rounds of its seed stop there.
            The loss of a trunk ends the training at once.
    """
    runs = context.recipe.runs
    ends = round_ends(runs)
    if any(spec.role != "run" for spec in specs):
        train_until_overfitted(context, specs, execute, overfits)
        return
    if len(ends) == 1:
        train_trunks(context, [spec.seed for spec in specs if not context.is_done(spec)], execute, choose, overfits)
        execute(specs)
        return
    seeds = dict.fromkeys(spec.seed for spec in specs)
    groups = [_Group(context, [spec for spec in specs if spec.seed == seed]) for seed in seeds]
    train_trunks(context, [group.seed for group in groups if group.needs_trunk], execute, choose, overfits)
    for group in groups:
        group.keep_start()
    failures = []
    for start, end in zip((0, *ends), ends, strict=False):
        active = [group for group in groups if group.step == start]
        todo = [spec for group in active for spec in group.round(start, end)]
        if not todo:
            continue
        try:
            execute(todo)
        except RunFailed as error:
            failures.append(str(error))
        for group in active:
            if group.has_reached(start, end):
                group.average(end, runs.outer)
    if failures:
        raise RunFailed("; ".join(failures))


class _Group:
    """The runs of one training seed."""

    def __init__(self, context: Context, specs: Sequence[RunSpec]) -> None:
        self._context, self._specs = context, specs
        self._runs = [context.run_dir(spec) for spec in specs]
        self._inputs = [context.run_inputs(spec) for spec in specs]
        self._file = round_start_file(self._runs[0], specs[0])
        self._all_inputs = digest(self._inputs)
        self._ends = round_ends(context.recipe.runs)
        self._kept = KeptRounds(context.folder, specs[0].seed, self._inputs)
        self.step = self._last_average()
        """The step up to which the runs have been averaged."""
        if self.step == 0:
            self._kept.discard()  # of other inputs, or of runs that are trained again

    @property
    def seed(self) -> int:
        """The training seed."""
        return self._specs[0].seed

    @property
    def needs_trunk(self) -> bool:
        """Whether the weights of the trunk are still needed: to start from, or to be kept."""
        return self.step == 0 or bool(self._start_to_keep)

    @property
    def _start_to_keep(self) -> list[int]:
        return self._kept.missing(number for number in self._context.recipe.runs.kept_rounds if number == 0)

    def keep_start(self) -> None:
        """Keep the weights at which the runs branched off as round 0, if they are to be kept."""
        if not self._start_to_keep:
            return
        (trunk,) = (trunk for trunk in planned_trunks(self._context.recipe) if trunk.seed == self.seed)
        step = branch_point(self._context, trunk)
        assert step is not None  # by train_trunks
        self._kept.keep(0, partial(write_mean, [self._context.run_dir(trunk).snapshot(step)]))

    def round(self, start: int, end: int) -> list[RunSpec]:
        """Return the specifications of one round."""
        return [replace(spec, start=start, end=end) for spec in self._specs]

    def has_reached(self, start: int, end: int) -> bool:
        """Return whether every run has reached the end of a round."""
        return all(self._context.has_reached(spec) for spec in self.round(start, end))

    def average(self, end: int, outer: Outer | None) -> None:
        """Write the weights that the next round starts from, after keeping their mean if it is to be kept.

        After the last round, remove the file and keep the mean of the finished runs.
        """
        number = self._ends.index(end) + 1
        is_kept = number in self._context.recipe.runs.kept_rounds
        if end == self._ends[-1]:
            self._file.unlink(missing_ok=True)
            if is_kept:
                self._kept.keep(number, partial(write_mean, [run.artefact for run in self._runs]))
            self.step = end
            return
        files = [run.checkpoint for run in self._runs]
        mean, buffers = mean_weights(list(zip(files, self._inputs, strict=True)), end)
        if is_kept:  # before the file below says that the round is complete
            self._kept.keep(number, partial(self._write, mean))
        momentum: Tensors = {}
        if outer is not None:
            before = load_state(self._file, self._all_inputs)
            if before is None:
                start = self._start()
            else:
                start, momentum = (of_kind(before[1], kind) for kind in ("model", "momentum"))
            for name in [name for name in mean if name not in buffers]:
                mean[name], momentum[name] = nesterov(start[name], mean[name], momentum.get(name), outer)
        tensors = {f"model.{name}": t for name, t in mean.items()} | {f"momentum.{name}": t for name, t in momentum.items()}
        save_state(self._file, tensors, {"inputs": self._all_inputs, "step": end})
        self.step = end

    def _start(self) -> Tensors:
        """Return the weights that the first round started from."""
        if self._context.recipe.runs.trunk_steps:
            return load_start(self._runs[0], self._specs[0])
        return initial_weights(self._context, self._specs[0])

    def _write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write weights, named as in the adapted model, as an adapter or a dense checkpoint."""
        model = adapted_model(self._context, self._specs[0])
        copy_into(model, weights)
        save_adapted(model, folder, base_folder=self._context.base_folder)

    def _last_average(self) -> int:
        """Return the step of the last average. If the files found are inconsistent, remove them and return 0."""
        ends = self._ends
        if all(run.is_done(inputs) for run, inputs in zip(self._runs, self._inputs, strict=True)):
            self._file.unlink(missing_ok=True)
            return self._unless_rounds_are_missing(ends[-1])
        header = load_header(self._file, self._all_inputs)
        start = int(header["step"]) if header else 0
        end = min(end for end in ends if end > start)
        for run, inputs in zip(self._runs, self._inputs, strict=True):
            header = load_header(run.checkpoint, inputs)
            consistent = end == ends[-1] if run.is_done(inputs) else start <= (header["step"] if header else 0) <= end
            if not consistent:
                self._forget()
                return 0
        return self._unless_rounds_are_missing(start)

    def _unless_rounds_are_missing(self, step: int) -> int:
        """Return the step of the last average, given the last one found and the kept rounds.

        The mean of finished runs can be taken again. If another round is missing and a merge needs it, the runs start again.
        """
        recipe = self._context.recipe
        kept = [number for number in recipe.runs.kept_rounds if number]  # the trunk's end can be kept later
        missing = self._kept.missing(number for number in kept if self._ends[number - 1] <= step)
        if missing == [len(self._ends)]:
            return self._ends[-2]
        if missing and recipe.merges_rounds:
            self._forget()
            return 0
        return step

    def _forget(self) -> None:
        self._file.unlink(missing_ok=True)
        for run in self._runs:
            run.checkpoint.unlink(missing_ok=True)
            if run.state:
                run.write_state(state="waiting", inputs=None, step=0)


def mean_weights(checkpoints: Sequence[tuple[Path, str]], step: int) -> tuple[Tensors, list[str]]:
    """Return the mean of the runs' weights and the names of buffers. Integer tensors are taken from the first run.

    Args:
        checkpoints: each run's checkpoint file and inputs hash, in the order of summation.
        step: the step that every checkpoint must be at.

    Raises:
        BadInput: a checkpoint is missing or at another step.
    """
    buffers: list[str] = []

    def weights() -> Iterator[Tensors]:
        for file, inputs in checkpoints:
            found = load_state(file, inputs, kinds=("model",))
            if found is None or found[0]["step"] != step:
                raise BadInput("a run is not at the end of its round", where=file, expected=f"a checkpoint of step {step}")
            buffers[:] = found[0]["buffers"]
            yield of_kind(found[1], "model")

    return mean_tensors(weights()), buffers


def nesterov(start: Tensor, mean: Tensor, momentum: Tensor | None, outer: Outer) -> tuple[Tensor, Tensor]:
    """Return the next round's start and the momentum: m ← μm + Δ and θ ← start − lr·(Δ + μm), with Δ = start − mean.

    This is `torch.optim.SGD(nesterov=True)` with Δ as the gradient (DiLoCo, Douillard et al. 2023). All tensors have one shape.
    """
    dtype = working_dtype(mean.dtype)
    step = start.to(dtype) - mean.to(dtype)
    momentum = step if momentum is None else torch.add(step, momentum, alpha=outer.momentum)
    ahead = torch.add(step, momentum, alpha=outer.momentum)
    return torch.add(start.to(dtype), ahead, alpha=-outer.lr).to(mean.dtype), momentum
