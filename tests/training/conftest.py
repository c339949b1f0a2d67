import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from emomerge.checkpoints import model_checkpoint, write_checkpoint
from emomerge.recipe import parse_recipe
from emomerge.tasks import make_task
from emomerge.training import Context


@pytest.fixture(scope="session")
def digits():
    """A recipe, its task and data, small enough for a few steps to take a moment."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    recipe = parse_recipe(
        {
            "name": "t",
            "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4}},
            "task": {"kind": "image-classification", "train": "digits", "limit": 64, "eval_fraction": 0.25},
            "adapter": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.2},
            "runs": {
                "procedure": "paper",
                "preset": "guarded",
                "steps": 6,
                "batch_size": 8,
                "checkpoint_every": 2,
                "parallel": "sequential",
            },
        }
    )
    task = make_task(recipe.task)
    return recipe, task, task.load_data(recipe.base)


@pytest.fixture(scope="session")
def base_folder(digits, tmp_path_factory):
    recipe, task, data = digits
    model = task.new_model(recipe.base, data)
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("made") / "base"
    model.config.save_pretrained(files)
    task.save_processor(files)
    write_checkpoint(model_checkpoint(model, source="base"), folder, files_from=files)
    return folder


@pytest.fixture
def context(digits, base_folder, tmp_path):
    """Make a context of the digits recipe with some fields changed; its runs lie below the test's own folder."""

    def context(folder="runs", *, task=None, base_hash="b", **changes):
        recipe, own_task, data = digits
        updated = {k: getattr(recipe, k).model_copy(update=v) if isinstance(v, dict) else v for k, v in changes.items()}
        changed = Context(recipe.model_copy(update=updated), base_folder, base_hash, tmp_path / folder)
        return changed.using(task or own_task, data)

    return context


class Kills:
    """Raises Stop at the `left`-th event from now on.

    Attributes:
        left: events until the next kill.
        step: the last step that a run took.
    """

    class Stop(Exception):
        """Stands for a kill: nothing of the runs survives it but their files."""

    def __init__(self) -> None:
        self.left, self.step = 0, 0

    def event(self, spec=None, row=None):
        """Count an event; also a callback after steps."""
        self.left, self.step = self.left - 1, row["step"] if row else self.step
        if self.left == 0:
            raise self.Stop

    def around(self, function):
        """Return a function that counts an event before and after each call."""

        def watched(*args, **kwargs):
            self.event()
            result = function(*args, **kwargs)
            self.event()
            return result

        return watched


@pytest.fixture
def kills():
    return Kills()
