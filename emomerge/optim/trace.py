"""A record of the pulse at every step."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from emomerge.optim.base import EmoOptimizer


class PulseTrace:
    """Records the pulse of an optimizer after every step, until closed. Does not affect the optimizer.

    Args:
        optimizer: any emo optimizer. With `capturable=True`, recording a row waits for the device.

    Example:
        >>> with PulseTrace(optimizer) as trace:
        ...     train(model, optimizer)
        >>> trace.save("pulse.jsonl")
    """

    rows: list[dict[str, Any]]
    """One row per step: the result of `EmoPulse.figures`."""

    def __init__(self, optimizer: EmoOptimizer) -> None:
        self.rows = []
        self._step = optimizer.pulse.steps
        self._handle = optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: Any, *_: Any) -> None:
        figures = optimizer.pulse.figures()
        if figures["step"] != self._step:  # a step with lr=0 does not change the pulse
            self.rows.append(figures)
        self._step = figures["step"]

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON lines."""
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def __enter__(self) -> PulseTrace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
