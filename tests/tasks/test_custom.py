from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import emomerge
from emomerge.checkpoints import load_into
from emomerge.errors import BadInput
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import Base, load_recipe
from emomerge.results import load_results
from emomerge.tasks import make_task
from emomerge.tasks.custom import Custom

RECIPES = Path(__file__).parent.parent.parent / "recipes"

LINE = """
import torch
from torch import nn

def make(rows=40, width=3, shape=None):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1, keepdim=True)
    part = lambda a, b: {"x": x[a:b], "y": y[a:b], "tokens": torch.arange(a, b) % 3 + 1}
    def loss(model, batch):
        error = (model(batch["x"]) - batch["y"]).square().squeeze(1)
        return (error, batch["tokens"]) if shape is None else error.reshape(shape)
    return {
        "model": nn.Linear(width, 1), "train": part(0, 20), "validation": part(20, 30), "test": part(30, rows), "loss": loss,
        "unit": "squares", "classes": (1, 2),
    }

make_nothing = None
def broken(): raise KeyError("oh no\\nsecond line")
def wants(more): return {}
def empty(): return {"model": 1}
def wrong(): return {**make(), "model": 1}
def ragged(): return {**make(), "test": {"x": torch.zeros(3), "y": torch.zeros(4)}}
def bare(): return {**make(), "train": [1, 2]}
def picture(): return {**make(), "samples": lambda model: torch.zeros(3, 3)}
"""


@pytest.fixture
def line(tmp_path):
    file = tmp_path / "line.py"
    file.write_text(LINE)
    return file


def task_of(file, name="make", **options):
    return make_task(Custom(kind="custom", function=f"{file}:{name}", options=options))


def test_a_function_gives_data_model_and_loss(line):
    task = task_of(line, rows=44)
    base = Base()
    data = task.load_data(base)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, 14)
    assert data.summary == "20 rows to train, 10 to validate, 14 to test" and data.classes == ("1", "2")
    assert task.unit == "squares" and task.samples(task.new_model(base, data)) is None
    model, batch = task.new_model(base, data), data.train.batch([4, 0, 7])
    found = task.row_figures(model, batch)
    errors = [float((model(batch["x"][row]) - batch["y"][row]).detach() ** 2) for row in range(3)]
    assert found.weight.tolist() == [2, 1, 2] and found.accuracy is None
    assert found.loss.tolist() == pytest.approx(errors)
    mean = (2 * errors[0] + errors[1] + 2 * errors[2]) / 5
    assert float(task.loss(model, batch).detach()) == pytest.approx(mean)


def test_weights_depend_on_the_bases_seed_alone(line):
    def weights(seed):
        task, base = task_of(line), Base(seed=seed)
        return task.new_model(base, task.load_data(base)).weight

    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(weights(0), one) and not torch.equal(weights(1), one)


def test_models_are_copies_and_load_safetensors(line, tmp_path):
    task, base = task_of(line), Base()
    data = task.load_data(base)
    one = task.new_model(base, data)
    with torch.no_grad():
        one.weight.fill_(7)
    assert not torch.equal(task.new_model(base, data).weight, one.weight)
    emomerge.write_checkpoint(emomerge.checkpoints.model_checkpoint(one, source="one"), tmp_path / "one.safetensors")
    for given in (
        task.reload_model(tmp_path / "one.safetensors"),
        task.new_model(Base(model=str(tmp_path / "one.safetensors")), data),
    ):
        assert torch.equal(given.weight, one.weight) and not given.training
    with pytest.raises(BadInput, match="another shape than the model's"):
        task_of(line, width=4).reload_model(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("none.py:make", "no such file: none.py; expected a Python file in the current folder or beside the recipe"),
        ("no.such.module:make", "cannot be imported: no.such.module:make; found ModuleNotFoundError: No module named 'no'"),
        ("{line}:maek", "no such function: .*:maek; did you mean 'make'"),
        ("{line}:make_nothing", "no such function"),
        ("{line}:broken", "the task's function fails: .*; found KeyError: 'oh no"),
        ("{line}:wants", "the task's function fails: .*missing 1 required positional argument"),
        ("{line}:empty", "returns the wrong thing: .*; expected a mapping with loss, model, test, train, validation; found"),
        ("{line}:wrong", "returns the wrong thing: .*; expected `model` a torch module, .*; found int and function"),
        ("{line}:ragged", r"`test` has empty fields, or .*: .*; expected equal rows; found \[3, 4\]"),
        ("{line}:bare", "`train` holds no data: .*; found list"),
    ],
)
def test_functions_that_do_not_keep_the_contract(line, function, message):
    with pytest.raises(BadInput, match=message) as caught:
        make_task(Custom(kind="custom", function=function.format(line=line))).load_data(Base())
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_run(tmp_path):
    (tmp_path / "bad.py").write_text("def make(:\n")
    with pytest.raises(BadInput, match="cannot be imported: .*bad.py:make; found SyntaxError"):
        task_of(tmp_path / "bad.py").load_data(Base())


def test_losses_and_pictures_have_their_shapes(line):
    task = task_of(line, shape=[1, -1])
    data = task.load_data(Base())
    with pytest.raises(
        BadInput, match=r"`loss` does not return one value per row: .*; expected \(3,\); found torch.Size\(\[1, 3\]\)"
    ):
        task.loss(task.new_model(Base(), data), data.train.batch([0, 1, 2]))
    task = task_of(line, "picture")
    with pytest.raises(BadInput, match="`samples` does not return a picture: .*; expected uint8"):
        task.samples(task.new_model(Base(), task.load_data(Base())))


def recipe_of(folder, **changes):
    content = {
        "name": "line",
        "task": {"kind": "custom", "function": "line.py:make"},
        "adapter": {"kind": "full"},
        "runs": {
            "procedure": "paper",
            "preset": "guarded",
            "steps": 20,
            "batch_size": 4,
            "lr": 100.0,
            "optimizers": ["sens", "cats"],
        },
        "merge": [{"method": "mean"}],
        "controls": [],
        "probe": {"batches": 1, "batch_size": 8, "directions": 2},
    }
    (folder / "line.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "line.yaml"


def test_a_recipe_finds_the_file_beside_it_and_runs_to_its_report(line, tmp_path):
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_of(tmp_path))
    assert recipe.task.function == f"{line}:make"
    made = Pipeline(recipe, tmp_path / "out")
    assert made.run() and not Pipeline(recipe, tmp_path / "out").run()
    losses = {row.name: row.loss("test") for row in load_results(tmp_path / "out").artefacts}
    assert losses["sens-0"] < losses["base"]
    assert [file.suffix for file in sorted((tmp_path / "out" / "base").iterdir())] == [".md", ".safetensors"]
    merged = nn.Linear(3, 1)
    load_into(merged, emomerge.open_checkpoint(tmp_path / "out" / "merges" / "mean"))
    test = made.data.test.batch(range(10))
    error, weight = (merged(test["x"]) - test["y"]).square().squeeze(1), test["tokens"]
    assert losses["mean"] == pytest.approx(float((error * weight).sum().detach() / weight.sum()), rel=1e-5)
    line.write_text(LINE.replace("x.sum(", "-x.sum("))
    assert not all(Pipeline(recipe, tmp_path / "out").status().values())  # another function, other runs


def test_what_a_recipe_may_say(tmp_path, line):
    with pytest.raises(BadInput, match="`task.function` in .*found 'line.py'"):
        load_recipe(recipe_of(tmp_path, task={"kind": "custom", "function": "line.py"}))
    with pytest.raises(BadInput, match="`base.prepare.model` in .*; expected one of 'custom' for the task custom; found 'vit'"):
        load_recipe(recipe_of(tmp_path, base={"prepare": {"model": "vit"}}))
    prepared = load_recipe(recipe_of(tmp_path, base={"prepare": {"model": "custom", "options": {"rows": 50}}}))
    assert prepared.base_task.options == {"rows": 50} and prepared.task.options == {}


def test_the_example(tmp_path):
    """A LoRA of a module that is no model of transformers, from a base that learnt under other options."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    changes = [
        "base.prepare.steps=100",
        "runs.procedure=paper", "runs.preset=guarded", "runs.steps=20", "runs.lr=30", "runs.optimizers=[sens, cats]",
        "controls=[distance-matched]", "merge=[{method: mean}]", "probe.batches=1", "probe.batch_size=16", "probe.directions=2",
    ]  # fmt: skip
    made = Pipeline(load_recipe(RECIPES / "autoencoder.yaml", changes), tmp_path / "out")
    assert made.run()
    results = load_results(tmp_path / "out")
    losses = {row.name: row.loss("test") for row in results.artefacts}
    assert losses["sens-0"] < losses["base"] and results.data.unit == "mean squared error"
    assert list(results.samples.images) == ["base", results.verdict.best_single[0], "mean"]
    from peft import PeftModel

    live = PeftModel.from_pretrained(made.task.reload_model(made.space.base), made.space.runs / "sens-0" / "adapter").eval()
    baked = made.task.reload_model(made.space.base)
    load_into(baked, emomerge.bake(made.space.base, made.space.runs / "sens-0"))
    batch = made.data.test.batch(range(8))
    torch.testing.assert_close(made.task.loss(live, batch), made.task.loss(baked, batch), atol=1e-6, rtol=1e-5)
