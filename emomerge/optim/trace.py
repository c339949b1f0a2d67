"""A record of the pulse: what the loss was, and what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from emomerge.optim.base import EmoOptimizer


class PulseTrace:
    """Records the pulse of an optimizer after every step, until it is closed. The optimizer does not notice.

    Args:
        optimizer: any emo optimizer. With `capturable=True` every row waits for the device.

    Example:
        >>> with PulseTrace(optimizer) as trace:
        ...     train(model, optimizer)
        >>> trace.save("pulse.jsonl")
    """

    rows: list[dict[str, Any]]
    """One for each step: the figures that `EmoPulse.figures` gives."""

    def __init__(self, optimizer: EmoOptimizer) -> None:
        self.rows = []
        self._step = optimizer.pulse.steps
        self._handle = optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: Any, *_: Any) -> None:
        figures = optimizer.pulse.figures()
        if figures["step"] != self._step:  # a step with lr=0 leaves the pulse alone
            self.rows.append(figures)
        self._step = figures["step"]

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON, one a line."""
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def __enter__(self) -> PulseTrace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
