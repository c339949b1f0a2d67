"""Stages of the pipeline, which are skipped if up to date and stamped on completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emomerge.experiment.workspace import Workspace, stopwatch

Facts = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: name of the stage and its stamp.
        inputs: returns the hash of everything that determines the result; None for runs, whose directories hold their state.
        files: returns the files whose presence and sizes the stamp records.
        do: does the work and returns facts for the stamp.
        is_intact: returns whether results that the stamp does not cover are up to date.
        show: shows an up-to-date stage in the progress display.
    """

    name: str
    inputs: Callable[[], str] | None
    files: Callable[[], list[Path]]
    do: Callable[[], Facts | None]
    is_intact: Callable[[], bool] = lambda: True
    show: Callable[[], None] = lambda: None

    def is_done(self, space: Workspace) -> bool:
        """Return whether the stage is up to date."""
        return (self.inputs is None or space.is_done(self.name, self.inputs())) and self.is_intact()

    def complete(self, space: Workspace) -> None:
        """Do the work unless the stage is up to date, and stamp it."""
        if self.is_done(space):
            self.show()
            return
        with stopwatch() as clock:
            facts = self.do() or {}
        if self.inputs is not None:
            space.write_stamp(self.name, self.inputs(), self.files(), **{**clock, **facts})
