"""The trunk: one run that takes the first steps for all runs of a training seed, which then branch off from its weights.

Branch-Train-Merge (Li et al. 2022) calls it the seed phase. Steps taken one after the other go further than the same number of
steps averaged over parallel runs, while the average is better at the end, where noise limits what a single run reaches.

The trunk keeps snapshots. The runs branch off from one of them, by default the last; a recipe that is run as a whole takes the
one with the lowest validation loss, and stops a trunk that has plainly overfitted. The weights are in
`runs/start-<seed>.safetensors`, under their names in the adapted model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from emomerge.recipe import Full
from emomerge.training.context import Context
from emomerge.training.early_ends import Execute, Overfits, train_until_overfitted
from emomerge.training.loop import adapt_model, adapted_model, buffers, trained
from emomerge.training.plan import RunSpec, planned_trunks
from emomerge.training.run_dir import start_file
from emomerge.training.state import load_header, save_state

Choose = Callable[[RunSpec], int]
"""Returns the step of a trunk's snapshots at which the runs branch off."""


def last_snapshot(trunk: RunSpec) -> int:
    """Return the last step of a trunk."""
    return trunk.snapshots[-1]


def train_trunks(
    context: Context, seeds: Sequence[int], execute: Execute, choose: Choose, overfits: Overfits | None = None
) -> None:
    """Train the trunks of some training seeds, and write the weights that their runs start from. Finished ones are skipped.

    Args:
        context: the recipe and its folders.
        seeds: training seeds of the recipe.
        execute: trains the given runs, unless they are done.
        choose: chooses where the runs branch off, once the trunk is trained.
        overfits: asked at the steps of `early_ends.checks`; None lets trunks take all their steps.
    """
    todo = [trunk for trunk in planned_trunks(context.recipe) if trunk.seed in seeds and branch_point(context, trunk) is None]
    if not todo:
        return
    train_until_overfitted(context, [trunk for trunk in todo if not context.is_done(trunk)], execute, overfits)
    for trunk in todo:
        run = context.run_dir(trunk)
        left = [step for step in trunk.snapshots if run.snapshot(step).is_dir()]
        step = left[0] if len(left) == 1 else choose(trunk)  # the others are removed once one is chosen
        weights = {f"model.{name}": t for name, t in weights_of(context, trunk, run.snapshot(step)).items()}
        save_state(start_file(run, trunk), weights, {"inputs": context.run_inputs(trunk), "step": 0, "branch_point": step})
        run.remove_snapshots(other for other in trunk.snapshots if other != step)


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
