"""Shallow training: run directories, the loop, and where runs are executed."""

from emomerge.training.executors import train_locally
from emomerge.training.live import TrainingRun
from emomerge.training.loop import initial_weights, train_run
from emomerge.training.prepare import fit
from emomerge.training.rounds import train_runs
from emomerge.training.runs import RunDir, RunSpec, planned_runs, run_inputs

__all__ = [
    "RunDir", "RunSpec", "TrainingRun", "fit", "initial_weights", "planned_runs", "run_inputs", "train_locally", "train_run",
    "train_runs",
]  # fmt: skip
