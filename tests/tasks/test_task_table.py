"""The table of tasks: every entry names a task whose section has that kind, and importing one needs no optional package."""

import inspect
import subprocess
import sys
from typing import get_args

import pytest

from emomerge.recipe import TaskSection
from emomerge.tasks import Task
from emomerge.tasks.table import TASKS, task_class

HEAVY = ("transformers", "datasets", "tokenizers", "sklearn", "PIL", "peft", "huggingface_hub")


@pytest.mark.parametrize("kind", TASKS)
def test_an_entry_names_a_task_with_a_section_of_that_kind(kind):
    task = task_class(kind)
    assert issubclass(task, Task) and not inspect.isabstract(task)
    assert issubclass(task.section_class, TaskSection)
    assert get_args(task.section_class.model_fields["kind"].annotation) == (kind,)


def test_importing_tasks_needs_no_optional_package():
    modules = ", ".join(["emomerge.tasks.sources", *(path.partition(":")[0] for path in TASKS.values())])
    code = f"import sys, {modules}; print(*({{*{HEAVY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_parsing_a_recipe_imports_only_its_own_task():
    task = {"kind": "custom", "function": "a.b:c"}
    code = f"""
import sys
from emomerge.recipe import parse_recipe
assert "torch" not in sys.modules
parse_recipe({{"name": "r", "task": {task}}})
assert "emomerge.tasks.custom" in sys.modules and "emomerge.tasks.causal_lm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_of_the_package_are_errors():
    import emomerge.tasks

    with pytest.raises(AttributeError):
        emomerge.tasks.nonsense  # noqa: B018
