"""Progress display: one line per stage or run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn


class Line:
    """One line of the progress display."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def at(self, done: float, note: str = "") -> None:
        """Set the completed amount and a note."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)

    def add(self, amount: float = 1, note: str | None = None) -> None:
        """Advance by an amount."""
        if self._progress is not None and self._task is not None:
            extra: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=amount, **extra)


class Display:
    """A progress display on standard error.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._quiet = quiet

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show lines live within the block."""
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, disable=self._quiet) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def line(self, title: str, total: float | None, note: str = "") -> Line:
        """Add a line for `total` units of work."""
        if self._progress is None:
            return Line(None, None)
        return Line(self._progress, self._progress.add_task(title, total=total, note=note))

    def say(self, text: str) -> None:
        """Print one line of text."""
        self.console.print(text, highlight=False, markup=False)
