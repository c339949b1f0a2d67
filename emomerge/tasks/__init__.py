"""Tasks: their data, models and losses. One file per task, one entry each in `emomerge.tasks.table`.

Names are imported when they are first used: the recipe reads the table without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.tasks.base import Batch as Batch
    from emomerge.tasks.base import Images as Images
    from emomerge.tasks.base import RowFigures as RowFigures
    from emomerge.tasks.base import Split as Split
    from emomerge.tasks.base import Task as Task
    from emomerge.tasks.base import TaskData as TaskData
    from emomerge.tasks.base import Texts as Texts
    from emomerge.tasks.table import make_task as make_task

__all__ = ["Batch", "Images", "RowFigures", "Split", "Task", "TaskData", "Texts", "make_task"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.table" if name == "make_task" else f"{__name__}.base"), name)
