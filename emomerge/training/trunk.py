"""The trunk: one run that takes the first steps for all runs of a training seed, which then branch off from its weights.

Branch-Train-Merge (Li et al. 2022) calls it the seed phase. Steps taken one after the other go further than the same number of
steps averaged over parallel runs, while the average is better at the end, where noise limits what a single run reaches.

The trunk keeps snapshots. The runs branch off from one of them, by default the last; a recipe that is run as a whole takes the
one with the lowest validation loss, and stops a trunk that has plainly overfitted. The weights are in
`runs/start-<seed>.safetensors`, under their names in the adapted model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from emomerge.recipe import Full
from emomerge.training.context import Context
from emomerge.training.loop import adapt_model, adapted_model, buffers, trained
from emomerge.training.plan import RunSpec, planned_trunks
from emomerge.training.run_dir import start_file
from emomerge.training.state import load_header, save_state

Choose = Callable[[RunSpec], int]
"""Returns the step of a trunk's snapshots at which the runs branch off."""
Execute = Callable[[Sequence[RunSpec]], None]
Overfits = Callable[[RunSpec, int], bool]
"""Returns whether a trunk has overfitted at the step of one of its snapshots, so that further steps are of no use."""


def last_snapshot(trunk: RunSpec) -> int:
    """Return the last step of a trunk."""
    return trunk.snapshots[-1]


def checks(trunk: RunSpec) -> list[int]:
    """Return the steps, the last one included, after which a trunk may have overfitted: earlier ones say too little."""
    return [step for step in trunk.snapshots if 4 * step >= trunk.steps]


def train_trunks(
    context: Context, seeds: Sequence[int], execute: Execute, choose: Choose, overfits: Overfits | None = None
) -> None:
    """Train the trunks of some training seeds, and write the weights that their runs start from. Finished ones are skipped.

    Args:
        context: the recipe and its folders.
        seeds: training seeds of the recipe.
        execute: trains the given runs, unless they are done.
        choose: chooses where the runs branch off, once the trunk is trained.
        overfits: asked at the steps of `checks`; None lets trunks take all their steps.
    """
    todo = [trunk for trunk in planned_trunks(context.recipe) if trunk.seed in seeds and branch_point(context, trunk) is None]
    if not todo:
        return
    _train(context, [trunk for trunk in todo if not context.is_done(trunk)], execute, overfits)
    for trunk in todo:
        run = context.run_dir(trunk)
        left = [step for step in trunk.snapshots if run.snapshot(step).is_dir()]
        step = left[0] if len(left) == 1 else choose(trunk)  # the others are removed once one is chosen
        weights = {f"model.{name}": t for name, t in weights_of(context, trunk, run.snapshot(step)).items()}
        save_state(start_file(run, trunk), weights, {"inputs": context.run_inputs(trunk), "step": 0, "branch_point": step})
        run.remove_snapshots(other for other in trunk.snapshots if other != step)


def _train(context: Context, trunks: Sequence[RunSpec], execute: Execute, overfits: Overfits | None) -> None:
    """Train trunks to their ends, or until they have overfitted."""
    if overfits is None:
        execute(trunks)
        return
    for start, end in pairwise((0, *checks(trunks[0]))) if trunks else ():  # all have the same steps
        active = [trunk for trunk in trunks if not context.is_done(trunk) and _step(context, trunk) <= end]
        execute([replace(trunk, start=start, end=end) for trunk in active])
        over = [trunk for trunk in active if end < trunk.steps and overfits(trunk, end)]
        execute([replace(trunk, start=end, end=end, is_stopped=True) for trunk in over])


def _step(context: Context, trunk: RunSpec) -> int:
    """Return the step of a trunk's checkpoint; 0 if there is none."""
    header = load_header(context.run_dir(trunk).checkpoint, context.run_inputs(trunk))
    return 0 if header is None else int(header["step"])


def branch_point(context: Context, trunk: RunSpec) -> int | None:
    """Return the step of a trunk at which the runs branch off; None if that is not decided yet."""
    run = context.run_dir(trunk)
    header = load_header(start_file(run, trunk), context.run_inputs(trunk))
    return None if header is None or not run.snapshot(header["branch_point"]).is_dir() else header["branch_point"]


def weights_of(context: Context, spec: RunSpec, folder: Path) -> dict[str, Tensor]:
    """Return the weights and buffers of a snapshot by their names in the adapted model."""
    if isinstance(context.recipe.adapter, Full):
        model = adapt_model(context, spec, folder)
    else:
        from peft import set_peft_model_state_dict

        model = adapted_model(context, spec)
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return {**{name: p.detach() for name, p in trained(model).items()}, **buffers(model)}
