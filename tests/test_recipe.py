from pathlib import Path

import pytest
import yaml

from emomerge.errors import BadInput
from emomerge.numerics.hashing import digest
from emomerge.recipe import FAMILY, Recipe, Runs, load_recipe, parse_recipe

MINIMAL = {
    "name": "r",
    "base": {"model": "some/model"},
    "task": {"kind": "text-classification", "train": "a.tsv"},
}
IMAGES = {"kind": "image-classification", "train": "digits"}
LANGUAGE = {"kind": "causal-lm", "train": "a.txt"}
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def with_(**changes):
    return parse_recipe({**MINIMAL, **changes})


def test_defaults():
    recipe = parse_recipe(MINIMAL)
    assert recipe.runs.optimizers == FAMILY
    assert recipe.runs == Runs(
        preset="auto",
        data_order="different",
        trunk=0.5,
        rounds=15,
        outer={"momentum": 0.5},
        max_grad_norm=1.0,
        cooldown=0.5,
        keep_rounds=8,
    )
    assert [m.label for m in recipe.merge] == ["soup-of-rounds", "mean", "tall-mask", "ties", "greedy-soup", "positioning"]
    assert recipe.merge[0].of == "rounds"


def test_paper_procedure_takes_one_word():
    recipe = with_(runs={"procedure": "paper"})
    assert recipe.runs == Runs(
        procedure="paper", preset="v3.8", data_order="same", trunk=0, rounds=1, outer=None, max_grad_norm=None, cooldown=0
    )
    assert [m.label for m in recipe.merge] == ["tall-mask", "mean", "ties", "greedy-soup", "positioning"]
    assert with_(runs={"procedure": "paper", "max_grad_norm": 0.5}).runs.max_grad_norm == 0.5


@pytest.mark.parametrize(("steps", "rounds"), [(5, 1), (19, 1), (20, 2), (299, 29), (300, 30), (10**6, 30)])
def test_rounds_have_ten_steps_or_more(steps, rounds):
    assert with_(runs={"steps": 2 * steps}).runs.rounds == rounds, "half of the steps are those of the trunk"
    recipe = with_(runs={"steps": steps, "trunk": 0})
    assert recipe.runs.rounds == rounds
    assert (recipe.runs.outer is None) == (rounds == 1)
    assert recipe.merge[0].label == ("soup-of-rounds" if rounds > 1 else "tall-mask")


def test_written_recipe_reads_back_equal():
    for runs in ({}, {"procedure": "paper"}, {"steps": 40, "rounds": 2}, {"steps": 3}):
        recipe = with_(runs=runs)
        assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(file):
    assert load_recipe(file).name == file.stem
    assert "emomerge run" in file.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runz": {}}, r"unknown recipe key: `runz` in recipe; did you mean `runs`\?"),
        ({"runs": {"step": 3}}, r"unknown recipe key: `runs\.step` in recipe; did you mean `steps`\?"),
        ({"adapter": {"kind": "lora", "ranks": 3}}, r"`adapter\.ranks` in recipe; did you mean `rank`\?"),
        ({"adapter": {"kind": "full", "rank": 3}}, r"`adapter\.rank` in recipe; known keys: kind"),
        ({"task": MINIMAL["task"] | {"columns": {"txt": 1}}}, r"`task\.columns\.txt` in recipe; did you mean `text`\?"),
        ({"task": MINIMAL["task"] | {"transform": {}}}, r"unknown recipe key: `task\.transform`"),
        (
            {"task": {"kind": "text-clasification", "train": "a"}},
            r"`task\.kind` in recipe; expected one of .*; found 'text-clasification'; did you mean `text-classification`\?",
        ),
        ({"task": {"kind": "text-classification"}}, r"recipe key missing: `task\.train` in recipe"),
        ({"runs": {"steps": 0}}, r"`runs\.steps` in recipe; expected input should be greater than or equal to 1; found 0"),
        ({"runs": {"steps": "many"}}, r"`runs\.steps`.*found 'many'"),
        ({"runs": {"optimizers": ["sens", "adam"]}}, r"`runs\.optimizers\.1`.*found 'adam'"),
        ({"runs": {"optimizers": ["sens", "sens"]}}, "`optimizers` has a duplicate"),
        ({"base": {}}, "either `model`"),
        ({"base": {"model": "a", "prepare": {"model": "mlp"}}}, "either `model`"),
        (
            {"base": {"prepare": {"model": "mlp"}}},
            "`base.prepare` in recipe; emomerge has no small network for the task text-classification; give `base.model`",
        ),
        (
            {"base": {"prepare": {"model": "mlp"}}, "task": LANGUAGE},
            r"`base\.prepare\.model` in recipe; expected one of 'llama' for the task causal-lm; found 'mlp'",
        ),
        (
            {"base": {"prepare": {"model": "vit", "train": "a.txt"}}, "task": IMAGES},
            "`base.prepare` in recipe; `train` has no effect on vit",
        ),
        (
            {"base": {"prepare": {"model": "llama", "transform": {"invert": True}}}, "task": LANGUAGE},
            "`transform` has no effect on llama",
        ),
        ({"task": LANGUAGE | {"columns": {"prompt": "q"}}}, "`prompt` and `completion` come together"),
        ({"task": LANGUAGE | {"columns": {"messages": "m", "text": "t"}}}, "give `text`, or `prompt`"),
        ({"task": LANGUAGE | {"packing": "tight"}}, r"`task\.packing`.*'none', 'separate' or 'joined'; found 'tight'"),
        ({"merge": [{"method": "mean"}, {"method": "mean", "scale": 2}]}, "two entries called 'mean'"),
        ({"merge": [{"method": "mean", "name": "../x"}]}, r"`merge\.0\.name`"),
        ({"merge": [{"method": "mean", "name": "tion-0"}]}, "'tion-0', which is the name of the base or of a run"),
        ({"runs": {"lr": 0}}, r"`runs\.lr`"),
        ({"runs": {"lr": 3.0}}, "`lr` has no effect with the preset `auto`; leave it out"),
        ({"runs": {"lr": {"cats": 3.0}}}, "`lr` has no effect with the preset `auto`"),
        ({"runs": {"procedure": "papers"}}, r"`runs\.procedure`"),
        ({"runs": {"lr": {"sens": 0}}}, r"`runs\.lr\.sens`.*greater than 0; found 0"),
        ({"runs": {"lr": {"adam": 1}}}, r"`runs\.lr\.adam`.*'sens', 'airy'.*found 'adam'"),
        ({"runs": {"average": {"kind": "lawa", "lst": 1}}}, r"`runs\.average\.lst` in recipe; did you mean `last`\?"),
        ({"runs": {"average": "mean"}}, r"`runs\.average\.kind`.*'ema', 'lawa'; found 'mean'"),
        ({"runs": {"cooldown": 1.5}}, r"`runs\.cooldown`.*found 1\.5"),
        ({"runs": {"rounds": 301}}, "`rounds` is 301 for 150 steps after the trunk"),
        ({"runs": {"rounds": 301, "trunk": 0}}, "`rounds` is 301 for 300 steps; a round needs a step"),
        ({"runs": {"rounds": 1, "outer": {}}}, "`outer` acts between rounds; give `rounds`"),
        ({"name": "../escape"}, "`name` in recipe"),
    ],
)
def test_wrong_fields_are_named_in_one_line(changes, message):
    with pytest.raises(BadInput, match=message) as caught:
        with_(**changes)
    assert "\n" not in str(caught.value)


def write(tmp_path, data):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_overrides(tmp_path):
    file = write(tmp_path, MINIMAL | {"merge": [{"method": "mean"}, {"method": "ties"}]})
    recipe = load_recipe(file, ["runs.steps=7", "merge.1.density=0.5", "task.train=../x=y.tsv", "runs.optimizers=[sens]"])
    assert recipe.runs.steps == 7
    assert recipe.merge[1].params == {"density": 0.5}
    assert recipe.task.train == "../x=y.tsv"
    assert recipe.runs.optimizers == ("sens",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs.steps", "--set takes key.sub=value; found 'runs.steps'"),
        ("merge.9.k=1", "--set names no item of the list"),
        ("name.sub=1", "--set reaches into a plain value"),
        ("runs.stesp=1", r"did you mean `steps`\?"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    file = write(tmp_path, MINIMAL | {"merge": [{"method": "mean"}]})
    with pytest.raises(BadInput, match=message):
        load_recipe(file, [override])


def test_unreadable_recipes(tmp_path):
    with pytest.raises(BadInput, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(BadInput, match="a recipe is a mapping of keys.*found list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(BadInput, match="the recipe is not YAML") as caught:
        load_recipe(tmp_path / "broken.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_yaml_cannot_build_objects(tmp_path):
    (tmp_path / "evil.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(BadInput, match="not YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_a_recipe_survives_its_own_yaml():
    recipe = with_(merge=[{"method": "tall-mask", "lambda": 0.3}], task={"kind": "image-classification", "train": "digits"})
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_the_order_of_classes_counts():
    task = {**MINIMAL["task"], "classes": {"bad": "< 0", "good": "> 0"}}
    turned = {**task, "classes": {"good": "> 0", "bad": "< 0"}}
    assert digest(with_(task=task)) == digest(with_(task=dict(task)))
    assert digest(with_(task=task)) != digest(with_(task=turned))


def test_what_is_merged_is_written_only_if_it_is_not_the_runs():
    """Hashes of merges that were made before there was a choice stay the same."""
    recipe = with_(merge=[{"method": "ties", "density": 0.5}, {"method": "mean", "of": "rounds"}], runs={"rounds": 3})
    ties, mean = recipe.model_dump(mode="json")["merge"]
    assert ties == {"method": "ties", "name": None, "dtype": "base", "density": 0.5}
    assert mean == {"method": "mean", "name": None, "dtype": "base", "of": "rounds"}
    assert (recipe.merge[1].params, recipe.merges_rounds) == ({}, True)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
