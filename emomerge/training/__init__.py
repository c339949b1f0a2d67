"""Training: contexts, run directories, training loops, and where runs are executed."""

from emomerge.training.context import Context, Job
from emomerge.training.device import choose_device
from emomerge.training.engines import Engine, open_engine
from emomerge.training.execute import Loaded, train_in_workers, train_locally
from emomerge.training.kept import KeptRounds
from emomerge.training.lease import Holder, holder_of
from emomerge.training.loop import initial_weights, train_run
from emomerge.training.plan import RunSpec, planned_runs, planned_trunks, run_inputs
from emomerge.training.prepare import fit
from emomerge.training.ranks import Ranks, follow, join_ranks
from emomerge.training.rounds import train_runs
from emomerge.training.run import TrainingRun
from emomerge.training.run_dir import RunDir
from emomerge.training.tracking import check_trackers
from emomerge.training.workers import catch_errors, run_in_workers

__all__ = [
    "Context", "Engine", "Holder", "Job", "KeptRounds", "Loaded", "Ranks", "RunDir", "RunSpec", "TrainingRun", "catch_errors",
    "check_trackers", "choose_device", "fit", "follow", "holder_of", "initial_weights", "join_ranks", "open_engine",
    "planned_runs", "planned_trunks", "run_in_workers", "run_inputs", "train_in_workers", "train_locally", "train_run",
    "train_runs",
]  # fmt: skip
