"""The kinds of task that a recipe's `task.kind` can name, and where each is implemented.

Importing this module imports no task and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emomerge.recipe import TaskSection
    from emomerge.tasks.base import Task

TASKS = {
    "text-classification": "emomerge.tasks.text_classification:TextClassificationTask",
    "image-classification": "emomerge.tasks.image_classification:ImageClassificationTask",
    "causal-lm": "emomerge.tasks.causal_lm:CausalLanguageModelTask",
    "flow-matching": "emomerge.tasks.flow_matching:FlowMatchingTask",
    "custom": "emomerge.tasks.custom:CustomTask",
}
"""Kind -> "module:class". The class names its section of the recipe as `section_class`."""


def task_class(kind: str) -> type[Task]:
    """Import and return the class of a kind in `TASKS`."""
    module, _, name = TASKS[kind].partition(":")
    found: type[Task] = getattr(import_module(module), name)
    return found


def make_task(section: TaskSection) -> Task:
    """Return the task that a recipe's section describes."""
    return task_class(section.kind)(section)
