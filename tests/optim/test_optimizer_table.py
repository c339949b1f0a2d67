import subprocess
import sys

import pytest
import torch
from torch import nn

from emomerge import optim
from emomerge.errors import BadInput
from emomerge.optim import OPTIMIZERS, EmoOptimizer
from emomerge.recipe import FAMILY, Runs, parse_recipe


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_describes_its_class(name: str) -> None:
    entry = OPTIMIZERS[name]
    options = {option: getattr(Runs(), option) for option in entry.options}
    p = nn.Parameter(torch.ones(3, 2))
    opt = entry.load()([p], **options)
    assert isinstance(opt, EmoOptimizer) and type(opt) is getattr(optim, entry.class_name)
    assert options.items() <= opt.param_groups[0].items()
    p.grad = torch.full_like(p, 2.0)
    opt.observe(1.0)
    opt.step()
    if entry.squared_gradients is not None:
        torch.testing.assert_close(opt.state[p][entry.squared_gradients], torch.full_like(p, 4.0 * (1 - 0.995)))
    assert (entry.state == "none") == (not opt.state[p])


def test_recipes_train_the_five_optimizers_of_the_paper_by_default() -> None:
    assert FAMILY == ("sens", "airy", "cats", "tion", "void")


def test_an_unknown_optimizer_in_a_recipe() -> None:
    with pytest.raises(BadInput, match=r"`runs\.optimizers\.0`.*'sens', 'airy'.*found 'cat'.*did you mean `cats`\?"):
        parse_recipe({"name": "x", "task": {"kind": "custom", "function": "f:g"}, "runs": {"optimizers": ["cat"]}})


MINE = """
import sys, types
from types import MappingProxyType
from emomerge.optim import table
mine = table.OptimizerEntry(path="mine:Mine", description="", source="", state="none")
table.OPTIMIZERS = MappingProxyType({**table.OPTIMIZERS, "mine": mine})
import emomerge.recipe
assert "torch" not in sys.modules
runs = {"optimizers": ["mine"], "preset": "v3.8", "lr": {"mine": 2.0}}
recipe = {"name": "x", "task": {"kind": "custom", "function": "f:g"}, "runs": runs}
runs = emomerge.recipe.parse_recipe(recipe).runs
assert runs.optimizers == ("mine",) and runs.lr_of("mine") == 2.0
assert emomerge.recipe.Runs().optimizers == ("sens", "airy", "cats", "tion", "void")
"""


def test_a_new_entry_is_all_that_a_recipe_needs() -> None:
    subprocess.run([sys.executable, "-c", MINE], check=True)
