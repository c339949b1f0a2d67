"""The smallest task of a plain torch module: `load_data` and `build`."""

import pytest
import torch
from torch import nn

from emomerge.checkpoints import model_checkpoint, write_checkpoint
from emomerge.recipe import Base
from emomerge.tasks import Split, Task, TaskData


class Parity(Task):
    def load_data(self, base):
        bits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        split = Split({"input": bits, "labels": bits.sum(dim=1).long() % 2})
        return TaskData(split, split, split, ("even", "odd"), "4 vectors of 2 bits")

    def build(self):
        return nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))


def test_new_models_depend_on_the_seed_of_the_base_alone():
    task, state = Parity(None), torch.get_rng_state()
    data = task.load_data(Base())
    one, two, other = (task.new_model(Base(seed=seed), data) for seed in (3, 3, 4))
    assert torch.equal(one[0].weight, two[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(torch.get_rng_state(), state) and not one.training


def test_saved_weights_are_loaded_as_a_base_and_as_a_result(tmp_path):
    task = Parity(None)
    data = task.load_data(Base())
    model = task.new_model(Base(seed=5), data)
    write_checkpoint(model_checkpoint(model, source="one"), tmp_path / "one")
    task.save_files(model, tmp_path / "one")
    for loaded in (task.reload_model(tmp_path / "one"), task.new_model(Base(model=str(tmp_path / "one")), data)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    batch = data.test.batch([0, 3])
    assert torch.equal(task.logits(loaded, batch), model(batch["input"]))


def test_a_task_without_a_model_says_what_is_missing():
    class Empty(Task):
        def load_data(self, base): ...

    with pytest.raises(NotImplementedError, match="Empty defines neither `build` nor `new_model`"):
        Empty(None).new_model(Base(), None)
