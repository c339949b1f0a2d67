"""Progress display: one line per stage or run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from emomerge.errors import shown, shown_lines


class PlainConsole(Console):
    """A console that shows every text literally: neither markup such as `[bold]` nor escape sequences in it have an effect."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text as `rich.console.Console` does, after `shown_lines`."""
        return super().render_str(shown_lines(text), **options)


def plain_console(*, stderr: bool = False, quiet: bool = False) -> PlainConsole:
    """Return a console for standard output or standard error."""
    return PlainConsole(stderr=stderr, quiet=quiet, markup=False, emoji=False)


class Line:
    """One line of the progress display."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def at(self, done: float, note: str = "") -> None:
        """Set the completed amount and a note."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=shown(note))

    def add(self, amount: float = 1, note: str | None = None) -> None:
        """Advance by an amount."""
        if self._progress is not None and self._task is not None:
            extra: dict[str, Any] = {} if note is None else {"note": shown(note)}
            self._progress.update(self._task, advance=amount, **extra)


class _Mark(SpinnerColumn):
    """A spinner that becomes a cross where the work failed."""

    failed = False

    def render(self, task: Task) -> RenderableType:
        """Return the mark of a line."""
        return Text("✗") if self.failed and not task.finished else super().render(task)


class Display:
    """A progress display on standard error.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = plain_console(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._quiet = quiet

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show lines live within the block."""
        columns = (
            (mark := _Mark(finished_text="✓")),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, disable=self._quiet) as progress:
            self._progress = progress
            try:
                yield
            except BaseException:
                mark.failed = True
                for task in progress.tasks:
                    if not task.completed:  # says nothing but that it was about to begin
                        progress.update(task.id, visible=False)
                raise
            finally:
                self._progress = None

    def line(self, title: str, total: float | None, note: str = "") -> Line:
        """Add a line for `total` units of work."""
        if self._progress is None:
            return Line(None, None)
        return Line(self._progress, self._progress.add_task(shown(title), total=total, note=shown(note)))

    def say(self, text: str) -> None:
        """Print one line of text."""
        self.console.print(shown_lines(text), highlight=False)
