"""Progress display: one line per stage or run.

On a terminal lines are bars; elsewhere, as in a log, each is told once a minute and when it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from emomerge.errors import shown, shown_lines

LONGEST_TITLE = 28
EVERY = 60.0
"""Seconds between two lines about the same work in a log."""


class PlainConsole(Console):
    """A console that shows every text literally: neither markup such as `[bold]` nor escape sequences in it have an effect."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text as `rich.console.Console` does, after `shown_lines`."""
        return super().render_str(shown_lines(text), **options)


def plain_console(*, stderr: bool = False, quiet: bool = False) -> PlainConsole:
    """Return a console for standard output or standard error."""
    return PlainConsole(stderr=stderr, quiet=quiet, markup=False, emoji=False)


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, with hours if there are any."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def times(elapsed: float | None, remaining: float | None, *, finished: bool) -> str:
    """Return the time that has passed and that is left, as far as they are known."""
    if elapsed is None:
        return ""
    return clock(elapsed) if finished or remaining is None else f"{clock(elapsed)}, {clock(remaining)} left"


def counts(done: float, total: float | None) -> str:
    """Return how much is done of how much."""
    return f"{done:,.0f}/{'?' if total is None else f'{total:,.0f}'}"


class Line:
    """One line of the progress display; this one is not shown."""

    def at(self, done: float, note: str = "") -> None:
        """Set the completed amount and a note."""

    def add(self, amount: float = 1, note: str | None = None) -> None:
        """Advance by an amount."""

    def end(self) -> None:
        """End where it is: the rest need not be done."""


class _BarLine(Line):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def at(self, done: float, note: str = "") -> None:
        self._begin()
        self._progress.update(self._task, completed=done, note=shown(note))

    def add(self, amount: float = 1, note: str | None = None) -> None:
        self._begin()
        extra: dict[str, Any] = {} if note is None else {"note": shown(note)}
        self._progress.update(self._task, advance=amount, **extra)

    def end(self) -> None:
        self._progress.update(self._task, total=self._progress.tasks[self._task].completed)

    def _begin(self) -> None:
        task = self._progress.tasks[self._task]
        if not task.started:
            self._progress.start_task(self._task)


class _LogLine(Line):
    """A line of a log. Its first amount may come from an earlier process, and does not count for the speed."""

    def __init__(self, console: Console, title: str, total: float | None, *, begun: bool) -> None:
        self._console, self._title, self._total = console, title, total
        self._done, self._note, self._told, self._lock = 0.0, "", False, Lock()
        self._started = self._last = time.monotonic()
        self._first: float | None = None
        self._begun = begun

    def at(self, done: float, note: str = "") -> None:
        with self._lock:
            self._set(done, note)

    def add(self, amount: float = 1, note: str | None = None) -> None:
        with self._lock:
            self._set(self._done + amount, self._note if note is None else note)

    def _set(self, done: float, note: str) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
            if not self._begun:
                self._started = self._last = now
        self._done, self._note = done, note
        finished = self._total is not None and done >= self._total
        if (finished and not self._told) or (not finished and now - self._last >= EVERY):
            self._told, self._last = finished, now
            self._print(now - self._started, finished=finished)

    def _print(self, elapsed: float, *, finished: bool) -> None:
        left = None
        if self._total and self._done > (self._first or 0.0):
            left = elapsed * (self._total - self._done) / (self._done - (self._first or 0.0))
        share = "" if finished or not self._total else f" ({self._done / self._total:.0%})"
        parts = [f"{counts(self._done, self._total)}{share}", times(elapsed, left, finished=finished), self._note]
        self._console.print(
            shown_lines(f"{self._title}: {', '.join(part for part in parts if part)}"), highlight=False, soft_wrap=True
        )


class _Mark(SpinnerColumn):
    """A spinner that becomes a cross where the work failed."""

    failed = False

    def render(self, task: Task) -> RenderableType:
        """Return the mark of a line."""
        return Text("✗") if self.failed and not task.finished else super().render(task)


class _Bar(BarColumn):
    """A bar that does not move before its work begins."""

    def render(self, task: Task) -> ProgressBar:
        """Return the bar of a line."""
        return ProgressBar(total=task.total, completed=task.completed, width=self.bar_width)


@dataclass
class _Words(ProgressColumn):
    """A column of text: `title`, `counts`, `times` or `note`. All but the note have their full width."""

    what: str

    def __post_init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=self.what != "note", overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        """Return the text of a line."""
        if self.what == "title":
            title = task.description
            text = title if len(title) <= LONGEST_TITLE else f"{title[:14]}…{title[14 + 1 - LONGEST_TITLE :]}"
        elif self.what == "counts":
            text = counts(task.completed, task.total)
        elif self.what == "times":
            elapsed = task.finished_time if task.finished else task.elapsed
            text = times(elapsed, task.time_remaining, finished=task.finished)
        else:
            text = task.fields["note"]
        return Text(text, no_wrap=True, overflow="ellipsis")


class Display:
    """A progress display on standard error.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = plain_console(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._quiet, self._in_log = quiet, False

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show lines live within the block."""
        if self._quiet:
            yield
            return
        if not self.console.is_terminal:
            self._in_log = True
            try:
                yield
            finally:
                self._in_log = False
            return
        mark = _Mark(finished_text="✓")
        columns = (mark, _Words("title"), _Bar(bar_width=8), _Words("counts"), _Words("times"), _Words("note"))
        with Progress(*columns, console=self.console) as progress:
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

    def line(self, title: str, total: float | None, note: str = "", *, begun: bool = True) -> Line:
        """Add a line for `total` units of work. Its time begins now, or with the first progress if it has not `begun`."""
        if self._in_log:
            return _LogLine(self.console, title, total, begun=begun)
        if self._progress is None:
            return Line()
        task = self._progress.add_task(shown(title), total=total, note=shown(note), start=begun)
        return _BarLine(self._progress, task)

    def say(self, text: str) -> None:
        """Print one line of text."""
        self.console.print(shown_lines(text), highlight=False)
