"""Shallow training: run directories, the loop, and where runs are executed."""

from emomerge.training.device import choose_device
from emomerge.training.engines import Engine, open_engine
from emomerge.training.executors import attempt, do_in_workers, train_in_workers, train_locally
from emomerge.training.lease import Holder, holder_of
from emomerge.training.live import TrainingRun
from emomerge.training.loop import initial_weights, train_run
from emomerge.training.prepare import fit
from emomerge.training.ranks import Ranks, follow, join_ranks
from emomerge.training.rounds import train_runs
from emomerge.training.runs import RunDir, RunSpec, planned_runs, run_inputs
from emomerge.training.tracking import check_trackers

__all__ = [
    "Engine", "Holder", "Ranks", "RunDir", "RunSpec", "TrainingRun", "attempt", "check_trackers", "choose_device",
    "do_in_workers", "fit", "follow", "holder_of", "initial_weights", "join_ranks", "open_engine", "planned_runs", "run_inputs",
    "train_in_workers", "train_locally", "train_run", "train_runs",
]  # fmt: skip
