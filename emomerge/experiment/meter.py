"""Progress of measurements, in forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from emomerge.progress import Line


class Meter:
    """Advances a progress line by every forward pass, so that it moves and its time left is right.

    Args:
        line: the line; by default nothing is shown.
    """

    def __init__(self, line: Line | None = None) -> None:
        self._line = Line() if line is None else line
        self._left, self._note = 0.0, ""

    @contextmanager
    def part(self, passes: float, note: str) -> Iterator[None]:
        """A part of the work with an expected cost. Passes that it did not need, as they were remembered, count at its end."""
        self._left, self._note = passes, note
        yield
        self.add(self._left)
        self._left = 0.0

    def add(self, passes: float) -> None:
        """Count passes; beyond what the part was expected to cost they are not shown."""
        step = min(passes, self._left)
        self._left -= step
        if step:
            self._line.add(step, self._note)
