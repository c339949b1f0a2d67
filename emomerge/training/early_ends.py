"""Runs that end early where they overfit: they are trained in pieces, after each of which a snapshot is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from emomerge.errors import RunFailed
from emomerge.training.context import Context
from emomerge.training.plan import RunSpec
from emomerge.training.state import load_header
from emomerge.training.workers import raise_together

Execute = Callable[[Sequence[RunSpec]], None]
Overfits = Callable[[RunSpec, int], bool]
"""Returns whether a run has overfitted at the step of one of its snapshots, so that further steps are of no use."""


def checks(spec: RunSpec) -> list[int]:
    """Return the steps after which a run may be found to have overfitted, its end included: earlier ones say too little."""
    return sorted({step for step in spec.snapshots if 4 * step >= spec.steps} | {spec.steps})


def train_until_overfitted(
    context: Context, specs: Sequence[RunSpec], execute: Execute, overfits: Overfits | None = None
) -> None:
    """Train runs to their ends; those with `ends_early` only until they have overfitted.

    Args:
        context: the recipe and its folders.
        specs: runs of equal length. Finished ones are skipped.
        execute: trains the given runs from `spec.start` to `spec.end`, unless they have reached it.
        overfits: asked at the steps of `checks`; None lets all runs take all their steps.

    Raises:
        RunFailed: a loss became NaN or infinite; raised after all other runs are trained.
    """
    early = next((spec for spec in specs if spec.ends_early), None)
    if overfits is None or early is None:
        execute(specs)
        return
    failures = []
    for start, end in pairwise((0, *checks(early))):
        pieces = [replace(spec, start=start, end=end) for spec in specs if not context.is_done(spec)]
        pieces = [piece for piece in pieces if start <= _step(context, piece) <= end]
        try:
            execute(pieces)
        except RunFailed as error:
            failures.append(error)
        there = [piece for piece in pieces if piece.ends_early and end < piece.steps and context.has_reached(piece)]
        execute([replace(piece, start=end, is_stopped=True) for piece in there if overfits(piece, end)])
    raise_together(failures)


def _step(context: Context, spec: RunSpec) -> int:
    """Return the step of a run's checkpoint; 0 if there is none."""
    header = load_header(context.run_dir(spec).checkpoint, context.run_inputs(spec))
    return 0 if header is None else int(header["step"])
