"""Write the shards of a merge in workers, one shard each; the bytes are the same as from a single process."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from emomerge.checkpoints import RoundingLoss
from emomerge.checkpoints.writer import Plan, WriteOptions, write_file
from emomerge.errors import EmomergeError
from emomerge.merging.diagnostics import Figures
from emomerge.merging.engine import MergedCheckpoint


class Engine(Protocol):
    """Starts workers; see `emomerge.training.open_engine`."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in a worker; returns a handle with `result()` and `cancel()`."""
        ...


class Shard(NamedTuple):
    """A file that a worker has written, with the figures and the rounding loss of its tensors."""

    sha256: str
    figures: dict[str, Figures]
    masking: bool
    loss: RoundingLoss


class ShardWriter:
    """Writes the shards of a merge in workers that see the same file system, with `write_checkpoint(…, shards_by=…)`.

    Args:
        merged: the merge; choices by held-out loss have been made.
        engine: starts all workers at once.
    """

    def __init__(self, merged: MergedCheckpoint, engine: Engine) -> None:
        self._merged, self._engine = merged, engine

    def __call__(self, shards: Sequence[tuple[Plan, Path]], options: WriteOptions) -> list[str]:
        """Write the tensors of each plan to its path and return the files' SHA-256; adds up figures and rounding loss."""
        sent = options._replace(loss=None, progress=None)
        calls = [
            self._engine.submit(write_shard, self._merged, plan, path.absolute(), sent, Path.cwd()) for plan, path in shards
        ]
        left = deque(calls)
        try:
            digests = []
            for plan, _ in shards:
                found = left[0].result()
                left.popleft()  # it has ended, and Ray ends this process if a task is cancelled as it ends
                digests.append(self._take(found, plan, options))
            return digests
        finally:
            for call in left:
                call.cancel()

    def _take(self, found: Shard | EmomergeError, plan: Plan, options: WriteOptions) -> str:
        if isinstance(found, EmomergeError):
            raise found
        self._merged.add_figures(found.figures, masking=found.masking)
        if options.loss is not None:
            options.loss.join(found.loss)
        if options.progress is not None:
            for name, info in plan.items():
                options.progress(name, info.nbytes)
        return found.sha256


def write_shard(
    merged: MergedCheckpoint, plan: Plan, path: Path, options: WriteOptions, working_directory: Path
) -> Shard | EmomergeError:
    """Write one shard in a worker."""
    loss = RoundingLoss(merged.base)
    try:
        with contextlib.chdir(working_directory):
            digest = write_file(merged, plan, path, options._replace(loss=loss))
    except EmomergeError as error:
        return error
    return Shard(digest, *merged.figures_of(plan), loss)
