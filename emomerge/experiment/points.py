"""The points of a run as artefacts: its end, and the snapshots on the way. Workers find them by what is on disk."""

from __future__ import annotations

from emomerge.adapters import open_run
from emomerge.checkpoints import atomic
from emomerge.experiment.measure import Artefact
from emomerge.numerics.hashing import digest
from emomerge.training import Context, RunSpec


def snapshot_of(context: Context, spec: RunSpec, step: int) -> Artefact:
    """Return a snapshot of a control or a trunk as an artefact, without its cost."""
    folder = context.run_dir(spec).snapshot(step)
    weights = {file.name: atomic.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return Artefact(
        f"{spec.name} at step {step}", "control", open_run(context.base, folder), digest([context.base_hash, weights]),
        path=folder, optimizer=spec.optimizer, seed=spec.seed,
    )  # fmt: skip


def end_of(context: Context, spec: RunSpec) -> Artefact:
    """Return the result of a finished run as an artefact, without its cost."""
    run = context.run_dir(spec)
    state = run.state
    return Artefact(
        spec.name, "run" if spec.role == "run" else "control", open_run(context.base, run.path),
        digest([context.base_hash, state["sha256"]]), path=run.artefact, optimizer=spec.optimizer, seed=spec.seed,
        control=spec.control, seconds=state["seconds"], sha256=state["sha256"],
    )  # fmt: skip
