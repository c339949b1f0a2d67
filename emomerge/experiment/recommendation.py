"""The recommendation: the model to use, or what to do instead where nothing was learnt or a control is better.

Models are chosen and compared on the validation rows; a difference counts if its 95 % interval excludes 0.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from emomerge.experiment.measure import Artefact, Measurer
from emomerge.probing import verdict
from emomerge.results import Selected
from emomerge.results import Split as SplitName


def recommend(
    measurer: Measurer,
    base: Artefact,
    runs: Sequence[Artefact],
    merges: Sequence[Sequence[Artefact]],
    controls: Sequence[Artefact],
) -> Selected:
    """Return the model to use if it is better than the base and no control is better than it.

    It is the recipe's first merge, unless a run or another merge has a validation loss that is lower by more than the interval:
    some merges fit weights to the validation rows, and the lowest of many losses is low by chance. Otherwise return the best
    control, or the base, and a sentence that says what to do.

    Args:
        measurer: has measured the artefacts.
        base: the base.
        runs, merges: the models to choose from; of merges, those of each entry of the recipe, in its order.
        controls: the controls that are models of their own: those in the claim `better`.
    """
    first = measurer.best(merges[0])
    other = measurer.best([*runs, *(merge for entry in merges[1:] for merge in entry)])
    winner = other if _is_better(measurer, other, first) else first
    learnt = _is_better(measurer, winner, base)
    bar = winner if learnt else base
    better = [control for control in controls if _is_better(measurer, control, bar)]
    loss = {artefact.name: measurer.loss(artefact, "validation") for artefact in (base, first, other, *better)}
    if better:
        control = measurer.best(better)
        sentence = (
            f"Take the control {control.name}: its validation loss is {loss[control.name]:.4f}, {winner.name}, the best run or "
            f"merge, has {loss[winner.name]:.4f}, and the difference is larger than its interval."
        )
        return Selected(
            name=control.name, path=None if control.path is None else str(control.path), validation_loss=loss[control.name],
            sentence=sentence, kind="control", command=_command(measurer, control),
        )  # fmt: skip
    if not learnt:
        sentence = (
            f"Nothing was learnt: the best run or merge, {winner.name}, has a validation loss of {loss[winner.name]:.4f} and "
            f"the base {loss[base.name]:.4f}; {_reason(measurer, winner, base)}."
        )
        return Selected(name=base.name, path=None, validation_loss=loss[base.name], sentence=sentence, kind="nothing")
    if winner is other:
        reason = f"below the {loss[first.name]:.4f} of the first merge, {first.name}, by more than the interval"
    elif loss[other.name] < loss[first.name]:
        reason = f"the loss of {other.name}, {loss[other.name]:.4f}, is lower by less than the interval"
    else:
        reason = f"no run and no other merge has a lower one ({other.name}: {loss[other.name]:.4f})"
    return Selected(
        name=winner.name, path=None if winner.path is None else str(winner.path), validation_loss=loss[winner.name],
        sentence=f"Use {winner.name}, with a validation loss of {loss[winner.name]:.4f}: {reason}.",
    )  # fmt: skip


def _is_better(measurer: Measurer, model: Artefact, other: Artefact, split: SplitName = "validation") -> bool:
    """Return whether a model's loss is lower than another's by more than the paired interval, or the other's is no number."""
    if model is other or not math.isfinite(measurer.loss(model, split)):
        return False
    if not math.isfinite(measurer.loss(other, split)):
        return True
    ours, theirs = (measurer.scores(artefact, split) for artefact in (model, other))
    difference = verdict.loss_difference(
        [ours["loss"]], [theirs["loss"]], ours["weight"], against=other.name, what=f"{split} loss"
    )
    return difference.sign < 0


def _reason(measurer: Measurer, winner: Artefact, base: Artefact) -> str:
    """Return the likely reason why nothing was learnt, and what to do."""
    runs, rows = measurer.recipe.runs, len(measurer.data.train)
    if not _is_better(measurer, winner, base, "train"):
        seen = runs.steps * runs.batch_size * runs.accumulation / rows
        return f"{runs.steps} steps ({seen:.2g} epochs of {rows} rows) moved not even the training loss: raise `runs.steps`"
    if measurer.loss(winner, "validation") < measurer.loss(base, "validation"):
        held_out = len(measurer.data.validation)
        return f"{held_out} validation rows cannot tell this from chance: hold out more rows, or raise `runs.steps`"
    return f"only the loss on the {rows} training rows fell, which were memorized: train on more data"


def _command(measurer: Measurer, artefact: Artefact) -> str:
    """Return the command that writes a control that is in no folder; empty if there is one."""
    if artefact.path is not None or artefact.method is None:
        return ""
    folder = measurer.context.base_folder
    needs_loss = ["--recipe", str(folder.parent / "recipe.yaml")] if artefact.method == "greedy-soup" else []
    paths = [str(path) for path in (folder, *artefact.sources)]
    return shlex.join(["emomerge", "merge", *paths, "--method", artefact.method, *needs_loss, "-o", Path(artefact.name).name])
