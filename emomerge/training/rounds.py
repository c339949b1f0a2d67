"""Rounds: the runs of a training seed meet, and each goes on from their mean with its own optimizer and pulse.

What passes between rounds is one file for each training seed, `meeting-<seed>.safetensors` beside the run directories, replaced
whole at each meeting: the weights that the next round starts from and the outer momentum. A run's own checkpoint at the end of
the round before gives its optimizer. So a kill at any moment leaves what the next start needs.

The mean of LoRA runs is that of the factors A and B, each for itself, as in FedIT (Zhang et al. 2024): it keeps their form and
the meaning of every optimizer's state. It differs from the mean of B·A by the covariance of the factors over the runs, which
more rounds make small: by 53 % of its length after one round of 300 steps, 11 % with six, 3 % with fifteen. Meeting at the mean
of B·A, cut to the rank, was as good with three and six rounds and worse with fifteen (`benchmarks/lora_meetings.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from emomerge.checkpoints import working_dtype
from emomerge.errors import BadInput, RunFailed
from emomerge.numerics.hashing import digest
from emomerge.recipe import Outer, Recipe
from emomerge.training.runs import RunDir, RunSpec, round_ends, run_inputs
from emomerge.training.state import load_header, load_state, of_kind, save_state

Tensors = dict[str, Tensor]


def train_runs(
    recipe: Recipe,
    specs: Sequence[RunSpec],
    folder: Path,
    base_hash: str,
    *,
    execute: Callable[[Sequence[RunSpec]], None],
    initial: Callable[[RunSpec], Mapping[str, Tensor]],
) -> None:
    """Train runs into `folder/<name>`, in rounds where the recipe wants them; those that are done are left alone.

    Args:
        recipe: what is trained.
        specs: all runs of a training seed, or controls, which have no rounds.
        folder, base_hash: as for `execute`.
        execute: trains the given runs from `spec.start` to `spec.end`, if they are not there yet.
        initial: the weights that a run starts from, by name; asked for outer momentum only.

    Raises:
        RunFailed: after everything else was trained, if any run met a non-finite loss; its seed's rounds end with it.
    """
    ends = round_ends(recipe.runs)
    if len(ends) == 1 or any(spec.role == "control" for spec in specs):
        execute(specs)
        return
    seeds = dict.fromkeys(spec.seed for spec in specs)
    groups = [_Group(recipe, [spec for spec in specs if spec.seed == seed], folder, base_hash) for seed in seeds]
    failures = []
    for start, end in zip((0, *ends), ends, strict=False):
        here = [group for group in groups if group.step == start]
        todo = [spec for group in here for spec in group.at(start, end)]
        if not todo:
            continue
        try:
            execute(todo)
        except RunFailed as error:
            failures.append(str(error))
        for group in here:
            if group.has_reached(start, end):
                group.meet(end, recipe.runs.outer, initial)
    if failures:
        raise RunFailed("; ".join(failures))


class _Group:
    """The runs of one training seed."""

    def __init__(self, recipe: Recipe, specs: Sequence[RunSpec], folder: Path, base_hash: str) -> None:
        self._specs = specs
        self._runs = [RunDir(folder / spec.name) for spec in specs]
        self._inputs = [run_inputs(recipe, spec, base_hash) for spec in specs]
        self._meeting = meeting_of(self._runs[0], specs[0])
        self._all_inputs = digest(self._inputs)
        self.step = self._begin(round_ends(recipe.runs))
        """Up to where the runs have met."""

    def at(self, start: int, end: int) -> list[RunSpec]:
        """The work of one round."""
        return [replace(spec, start=start, end=end) for spec in self._specs]

    def has_reached(self, start: int, end: int) -> bool:
        """Whether every run has done that work."""
        pieces = zip(self._runs, self._inputs, self.at(start, end), strict=True)
        return all(run.has_reached(inputs, spec) for run, inputs, spec in pieces)

    def meet(self, end: int, outer: Outer | None, initial: Callable[[RunSpec], Mapping[str, Tensor]]) -> None:
        """Write down where the next round starts; after the last one there is none."""
        self.step = end
        if end == self._specs[0].steps:
            self._meeting.unlink(missing_ok=True)
            return
        files = [run.checkpoint for run in self._runs]
        mean, buffers = mean_weights(list(zip(files, self._inputs, strict=True)), end)
        momentum: Tensors = {}
        if outer is not None:
            before = load_state(self._meeting, self._all_inputs)
            if before is None:
                came_from = dict(initial(self._specs[0]))
            else:
                came_from, momentum = (of_kind(before[1], kind) for kind in ("model", "momentum"))
            for name in [name for name in mean if name not in buffers]:
                mean[name], momentum[name] = nesterov(came_from[name], mean[name], momentum.get(name), outer)
        tensors = {f"model.{name}": t for name, t in mean.items()} | {f"momentum.{name}": t for name, t in momentum.items()}
        save_state(self._meeting, tensors, {"inputs": self._all_inputs, "step": end})

    def _begin(self, ends: Sequence[int]) -> int:
        """Up to where the runs have met; 0, and everything forgotten, where what is left of them does not fit together."""
        if all(run.is_done(inputs) for run, inputs in zip(self._runs, self._inputs, strict=True)):
            return ends[-1]
        header = load_header(self._meeting, self._all_inputs)
        start = int(header["step"]) if header else 0
        end = min(end for end in ends if end > start)
        for run, inputs in zip(self._runs, self._inputs, strict=True):
            header = load_header(run.checkpoint, inputs)
            there = end == ends[-1] if run.is_done(inputs) else start <= (header["step"] if header else 0) <= end
            if not there:
                self._forget()
                return 0
        return start

    def _forget(self) -> None:
        self._meeting.unlink(missing_ok=True)
        for run in self._runs:
            run.checkpoint.unlink(missing_ok=True)
            if run.state:
                run.write_state(state="waiting", inputs=None, step=0)


def mean_weights(checkpoints: Sequence[tuple[Path, str]], step: int) -> tuple[Tensors, list[str]]:
    """The plain mean over runs, summed in their order; of what does not float, the first run's. And which names are buffers.

    Args:
        checkpoints: of each run the file and its inputs.
        step: where all of them have to be. Raises BadInput where one is not.
    """
    total: Tensors = {}
    weights: Tensors = {}
    buffers: list[str] = []
    for file, inputs in checkpoints:
        found = load_state(file, inputs, kinds=("model",))
        if found is None or found[0]["step"] != step:
            raise BadInput("a run has left its round", where=file, expected=f"a checkpoint of step {step}")
        buffers, weights = found[0]["buffers"], of_kind(found[1], "model")
        for name, tensor in weights.items():
            if name not in total:
                total[name] = tensor.to(working_dtype(tensor.dtype)) if tensor.is_floating_point() else tensor
            elif tensor.is_floating_point():
                total[name] = total[name] + tensor
    count = len(checkpoints)
    return {n: (t / count).to(weights[n].dtype) if t.is_floating_point() else t for n, t in total.items()}, buffers


def nesterov(start: Tensor, mean: Tensor, momentum: Tensor | None, outer: Outer) -> tuple[Tensor, Tensor]:
    """Where the next round starts, and the momentum: m ← μm + Δ and θ ← start − lr·(Δ + μm), with Δ = start − mean.

    That is `torch.optim.SGD(nesterov=True)` with Δ for a gradient (Douillard et al. 2023). Tensors of one shape.
    """
    dtype = working_dtype(mean.dtype)
    step = start.to(dtype) - mean.to(dtype)
    momentum = step if momentum is None else torch.add(step, momentum, alpha=outer.momentum)
    ahead = torch.add(step, momentum, alpha=outer.momentum)
    return torch.add(start.to(dtype), ahead, alpha=-outer.lr).to(mean.dtype), momentum


def meeting_of(run: RunDir, spec: RunSpec) -> Path:
    """The file that holds what a run's round starts from."""
    return run.path.parent / f"meeting-{spec.seed}.safetensors"


def load_meeting(run: RunDir, spec: RunSpec) -> Tensors:
    """The weights that a run's round starts from, by name. Raises BadInput where they are missing."""
    file = meeting_of(run, spec)
    found = load_state(file, kinds=("model",))
    if found is None or found[0]["step"] != spec.start:
        raise BadInput("the weights that the round starts from are missing", where=file, fix="run the same command again")
    return of_kind(found[1], "model")
