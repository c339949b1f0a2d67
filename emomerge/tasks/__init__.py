"""What is learnt: one file a task, one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emomerge import recipe
from emomerge.tasks.base import Batch, Images, RowFigures, Split, Task, TaskData, Texts
from emomerge.tasks.causal_lm import CausalLanguageModelTask
from emomerge.tasks.custom import CustomTask
from emomerge.tasks.flow_matching import FlowMatchingTask
from emomerge.tasks.image_classification import ImageClassificationTask
from emomerge.tasks.text_classification import TextClassificationTask

__all__ = ["TASKS", "Batch", "Images", "RowFigures", "Split", "Task", "TaskData", "Texts", "make_task"]

TASKS: dict[str, Callable[[Any], Task]] = {
    TextClassificationTask.kind: TextClassificationTask,
    ImageClassificationTask.kind: ImageClassificationTask,
    CausalLanguageModelTask.kind: CausalLanguageModelTask,
    FlowMatchingTask.kind: FlowMatchingTask,
    CustomTask.kind: CustomTask,
}
"""The recipe's `task.kind` → what builds the task from its section."""


def make_task(section: recipe.Task) -> Task:
    """The task that a recipe's section describes."""
    return TASKS[section.kind](section)
