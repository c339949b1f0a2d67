"""Task and data of the last recipe, kept in a process.

A worker that is a copy of its parent, or has had a job of the recipe, then need not load them. Everything kept is read-only.
"""

from __future__ import annotations

from emomerge.numerics.hashing import digest
from emomerge.tasks import Task, TaskData
from emomerge.training.context import Context

_KEPT: dict[str, tuple[Task, TaskData]] = {}


def keep(context: Context) -> None:
    """Keep a context's task and data for `warmed`, in this process and copies of it. They are loaded if necessary."""
    found = context.task, context.data
    _KEPT.clear()
    _KEPT[_key(context)] = found


def forget() -> None:
    """Free what is kept."""
    _KEPT.clear()


def warmed(context: Context) -> Context:
    """Return a context with the task and the data that are kept; those of another recipe are loaded and replace them."""
    if _key(context) not in _KEPT:
        keep(context)
    return context.using(*_KEPT[_key(context)])


def _key(context: Context) -> str:
    return digest([context.recipe.task, context.recipe.base, str(context.working_directory)])
