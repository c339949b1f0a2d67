"""What a recipe names is found from its folder; an output is known from anywhere, and not overwritten by another recipe."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from emomerge.cli import main
from emomerge.cli.status import status_of
from emomerge.errors import BadInput, Note
from emomerge.experiment.pipeline import Pipeline
from emomerge.experiment.workspace import Workspace
from emomerge.recipe import Recipe, load_recipe

OWN = """
import torch
from pathlib import Path
from torch import nn

def make(rows, width=4, seed=0):
    data = torch.tensor([float(x) for x in Path(rows).read_text().split()])[:, None]
    split = {"x": data}
    return {"model": nn.Linear(1, 1), "loss": lambda model, batch: model(batch["x"]).square().flatten(1).mean(1),
            "train": split, "validation": split, "test": split}
"""


def recipe_data(**changes: Any) -> dict[str, Any]:
    return {
        "name": "own", "base": {"prepare": {"model": "custom", "steps": 2, "batch_size": 2}},
        "task": {"kind": "custom", "function": "own.py:make", "options": {"rows": "rows.txt"}},
        "adapter": {"kind": "full"},
        "runs": {"procedure": "paper", "steps": 2, "optimizers": ["sens", "cats"], "batch_size": 2},
        "merge": [{"method": "mean"}], "controls": [], **changes,
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "rows.txt").write_text("1 2 3 4 5 6 7 8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_data()))
    return folder


def with_base(recipe: Recipe, out: Path) -> Pipeline:
    """Return a pipeline whose base is made and nothing else."""
    pipeline = Pipeline(recipe, out)
    with pipeline.space.locked():
        pipeline.begin()
        pipeline.stages[0].complete(pipeline.space)
    return pipeline


def test_paths_start_from_the_recipes_folder_before_the_working_directory(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", "rows.txt"):
        (tmp_path / name).write_text("another")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task: Any = load_recipe("project/recipe.yaml").task
    assert task.function == f"{project / 'own.py'}:make"
    assert task.options == {"rows": str(project / "rows.txt")}


def test_the_working_directory_comes_second_with_a_note(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "rows.txt").rename(tmp_path / "rows.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(Note, match=r"rows\.txt is not in project, beside the recipe"):
        task: Any = load_recipe("project/recipe.yaml").task
    assert task.options == {"rows": str(tmp_path / "rows.txt")}


def test_what_is_set_on_the_command_line_starts_from_the_working_directory(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.txt").write_text("1 2")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task: Any = load_recipe("project/recipe.yaml", ["task.options.rows=rows.txt"]).task
    assert task.options == {"rows": str(tmp_path / "rows.txt")}


@pytest.mark.parametrize(
    ("section", "value"),
    [("train", "reviews.tsv"), ("validation", "reviews.tsv"), ("test", "data"), ("model", "models/own"), ("model", "own")],
)
def test_data_and_models_are_found_too_and_hub_ids_stay(project: Path, section: str, value: str) -> None:
    (project / "reviews.tsv").write_text("x")
    for name in ("data", "models/own", "own"):
        (project / name).mkdir(parents=True)
    task = {"kind": "text-classification", "train": "somebody/reviews", **({} if section == "model" else {section: value})}
    base = {"model": value if section == "model" else "somebody/model"}
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(task=task, base=base)))
    recipe = load_recipe(project / "recipe.yaml")
    located = {"model": recipe.base.model, **recipe.task.model_dump()}
    assert located[section] == str(project / value)
    ids = {"model": "somebody/model", "train": "somebody/reviews"}
    assert all(located[name] == name_on_hub for name, name_on_hub in ids.items() if name != section)
    assert recipe.as_written().task.model_dump()["train"] == task["train"]
    assert recipe.as_written().base.model == base["model"]


def test_the_bundled_digits_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    data = recipe_data(task={"kind": "image-classification", "train": "digits"}, base={"prepare": {"model": "mlp"}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert load_recipe("recipe.yaml").task.model_dump()["train"] == "digits"


def test_status_is_the_same_from_every_directory(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    with_base(load_recipe("recipe.yaml"), Path("out"))
    here = status_of(Path("out"))
    monkeypatch.chdir(tmp_path)
    there = status_of(Path("project/out"))
    assert here["stages"]["base"] is True
    assert there["stages"] == here["stages"]
    again = Pipeline(load_recipe("project/recipe.yaml"), Path("project/out"))
    assert again.status()["base"] is True  # although the recipe's own path is another text
    assert "/" not in again.as_written.task.model_dump()["options"]["rows"]  # what the report shows


def test_a_folder_that_an_earlier_version_finished_stays_finished(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    out = Path("out")
    pipeline = with_base(load_recipe("recipe.yaml"), out)
    (out / "stamps/paths.json").unlink()  # which it did not write, as it wrote relative paths
    (out / "recipe.yaml").write_text(pipeline.recipe_yaml)
    assert Pipeline(load_recipe("recipe.yaml"), out).status()["base"] is True


CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "another"},
    "base": {"base": {"prepare": {"model": "custom", "steps": 3, "batch_size": 2}}},
    "task": {"task": {"kind": "custom", "function": "own.py:make", "options": {"rows": "rows.txt", "width": 5}}},
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("command", ["run", "train-all"])
def test_the_folder_of_another_recipe_is_not_overwritten(project: Path, part: str, command: str) -> None:
    with_base(load_recipe(project / "recipe.yaml"), project / "out")
    before = contents(project / "out")
    (project / "other.yaml").write_text(yaml.safe_dump(recipe_data(**CHANGES[part])))
    result = run(command, str(project / "other.yaml"), "-o", str(project / "out"))
    assert result.exit_code == 2
    assert f"another {part}" in result.output
    assert "--restart" in result.output
    assert contents(project / "out") == before


def test_more_steps_or_other_merges_are_the_same_recipe(project: Path) -> None:
    with_base(load_recipe(project / "recipe.yaml"), project / "out")
    changed = recipe_data(runs={"procedure": "paper", "steps": 3, "optimizers": ["sens"]}, merge=[{"method": "ties"}])
    (project / "recipe.yaml").write_text(yaml.safe_dump(changed))
    with_base(load_recipe(project / "recipe.yaml"), project / "out")


def test_a_folder_whose_recipe_is_damaged_is_not_overwritten(project: Path) -> None:
    with_base(load_recipe(project / "recipe.yaml"), project / "out")
    (project / "out/recipe.yaml").write_text("{")
    with pytest.raises(BadInput, match="cannot be read.*--restart"):
        with_base(load_recipe(project / "recipe.yaml"), project / "out")


def test_a_folder_without_models_is_anyones(project: Path) -> None:
    pipeline = Pipeline(load_recipe(project / "recipe.yaml"), project / "out")
    with pipeline.space.locked():
        pipeline.begin()  # and then the base could not be loaded
    with_base(load_recipe(project / "recipe.yaml", ["base.prepare.steps=3"]), project / "out")
    assert json.loads((project / "out/stamps/base.json").read_text())["inputs"]


def test_a_run_that_writes_nothing_leaves_no_folders(tmp_path):
    with Workspace(tmp_path / "out" / "mine").locked():
        assert (tmp_path / "out" / "mine").is_dir()
    assert not [*tmp_path.iterdir()]
