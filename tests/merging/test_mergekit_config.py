"""Reading mergekit's YAML: what it becomes, and the field that an error names. That the result agrees is shown elsewhere."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.merging import check_params
from emomerge.merging.mergekit import TRANSLATIONS, read_config

NAMES = ["embed.w", "layers.0.attn.w", "layers.0.mlp.w", "layers.1.attn.w", "layers.1.mlp.w"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["base", "a", "b"]):
        generator = torch.Generator().manual_seed(i)
        save_file({n: torch.randn(4, 3, generator=generator) for n in NAMES}, f"{name}.safetensors")
    return tmp_path


def config(**fields):
    models = [{"model": "a.safetensors", "parameters": {"weight": 1}}, {"model": "b.safetensors", "parameters": {"weight": 2}}]
    whole = {"merge_method": "ties", "base_model": "base.safetensors", "models": models, **fields}
    return {key: value for key, value in whole.items() if value is not None}


def read(folder, **fields):
    (folder / "c.yaml").write_text(yaml.safe_dump(config(**fields)))
    return read_config(folder / "c.yaml")


@pytest.mark.parametrize("method", TRANSLATIONS)
def test_every_method_of_the_table_is_one_of_ours(method):
    dialect = TRANSLATIONS[method]
    ours = {new for new, _ in [*dialect.each_model.values(), *dialect.shared.values()]}
    known = check_params(dialect.method, {})
    assert {*ours, *dialect.fixed, *dialect.copied} <= {key.rstrip("_") for key in known}


def test_models_base_and_parameters(folder):
    merge = read(folder, parameters={"density": [0.5, 0.7], "lambda": 0.8, "normalize": False}, out_dtype="bfloat16")
    assert merge[:3] == ("base.safetensors", ("a.safetensors", "b.safetensors"), "ties")
    assert merge.dtype == "bfloat16"
    expected = {"preset": "mergekit", "weights": [1, 2], "density": [0.5, 0.7], "scale": 0.8, "aggregate": "sum"}
    assert merge.params.items() >= expected.items()


def test_the_nearest_place_that_says_something_counts(folder):
    parameters = {"weight": 1, "density": [{"filter": "mlp", "value": 0.5}]}
    models = [{"model": "a.safetensors", "parameters": parameters}, {"model": "b.safetensors", "parameters": {"weight": 1}}]
    density = read(folder, models=models, parameters={"density": 0.3}).params["density"]
    assert density == [{"filter": "mlp", "value": 0.5, "run": 1}, {"value": 0.3, "run": 1}, {"value": 0.3, "run": 2}]
    density = read(folder, models=models).params["density"]
    assert density[1:] == [{"value": 1.0, "run": 1}, {"value": 1.0, "run": 2}]  # mergekit's default


def test_models_may_be_written_out(folder):
    models = [{"model": {"model": {"path": "a.safetensors"}}, "parameters": {"weight": 1}},
              {"model": "base.safetensors+adapter", "parameters": {"weight": 1}}]  # fmt: skip
    assert read(folder, models=models).runs == ("a.safetensors", "adapter")


def test_without_a_base_the_first_model_is_one(folder):
    merge = read(folder, merge_method="linear", base_model=None)
    assert (merge.base, merge.method) == ("a.safetensors", "mean")
    merge = read(folder, merge_method="nuslerp", base_model=None)
    assert (merge.params["origin"], merge.params["along"]) == ("zero", "tensor")
    assert read(folder, merge_method="nuslerp").params["origin"] == "base"


def test_slerp_starts_at_the_base(folder):
    sources = [{"model": f"{name}.safetensors", "layer_range": [0, 2]} for name in ("a", "b")]
    fields = {"merge_method": "slerp", "models": None, "slices": [{"sources": sources}], "parameters": {"t": [0, 1]}}
    merge = read(folder, **fields, base_model="b.safetensors")
    assert (merge.base, merge.runs) == ("b.safetensors", ("b.safetensors", "a.safetensors"))


SOURCES = [{"model": f"{name}.safetensors", "layer_range": [0, 2]} for name in ("a", "b")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_method": "passthrough"}, "unsupported mergekit method: merge_method;"),
        ({"merge_method": "arcee_fusion"}, "found arcee_fusion"),
        ({"base_model": None}, "needs a base: base_model"),
        ({"base_model": "base.safetensors+x"}, "base with an adapter: base_model"),
        ({"modules": {}}, "mergekit field: modules"),
        ({"tokenizer_source": "union"}, "mergekit value: tokenizer_source; expected 'base'; found 'union'"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "mergekit field: tokenizer.tokens"),
        ({"chat_template": "chatml"}, "chat_template"),
        ({"dtype": "float64"}, "dtype"),
        ({"models": [{"model": "a@main"}]}, "models.0.model; expected path or path+adapter; found 'a@main'"),
        ({"models": [{"model": "a.safetensors+x", "parameters": {"weight": 1}}]}, "than the base: models.0.model"),
        ({"models": [{"model": "a.safetensors", "weight": 1}]}, "models.0.weight"),
        ({"models": [{"model": "a.safetensors"}]}, "a number is missing: models.0.parameters.weight"),
        ({"models": [{"model": "base.safetensors"}]}, "nothing to merge with the base: models"),
        ({"models": None}, "either models or slices"),
        ({"models": None, "slices": [{"sources": SOURCES}] * 2}, "slices"),
        ({"models": None, "slices": [{"sources": SOURCES, "residual_weight": 1}]}, "slices.0.residual_weight"),
        ({"models": None, "merge_method": "slerp", "base_model": "a.safetensors", "parameters": {"t": 0},
          "slices": [{"sources": [{**s, "layer_range": [0, 1]} for s in SOURCES]}]},
         "rearranged: slices.0.sources.0.layer_range; expected [0, 2]: all of them; found (0, 1)"),
        ({"merge_method": "slerp", "base_model": "a.safetensors", "models": [{"model": "b.safetensors"}]},
         "a number is missing: parameters.t"),
        ({"parameters": {"densty": 1}}, "mergekit parameter: parameters.densty; expected density, int8_mask"),
        ({"parameters": {"rescale": True}}, "parameters.rescale; expected false; found True"),
        ({"parameters": {"normalize": "maybe"}}, "parameters.normalize; expected true or false"),
        ({"parameters": {"density": 2}}, "`density` of ties"),
        ({"merge_method": "linear", "parameters": {"normalize": False}, "base_model": None},
         "parameters.normalize; expected true; found false, and weights of sum 3 for embed.w"),
        ({"merge_method": "multislerp", "parameters": {"normalize_weights": False}}, "parameters.normalize_weights"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_named(folder, fields, message):
    with pytest.raises(BadInput) as error:
        read(folder, **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "merge_method: ties\nmodels: 3"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BadInput):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")


# The command.


def call(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


def test_the_command_merges_by_a_configuration(folder):
    (folder / "c.yaml").write_text(
        yaml.safe_dump(config(merge_method="dare_ties", parameters={"density": 0.5}, dtype="float16"))
    )
    done = call("--config", "c.yaml", "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    assert call("--config", "c.yaml", "-o", "again", "--seed", 1, "--dtype", "base").exit_code == 0
    record, again = (json.loads((folder / out / "merge.json").read_text()) for out in ("out", "again"))
    assert (record["method"], record["params"]["seed"], record["params"]["rescale"]) == ("dare-ties", 0, "l1")
    assert again["params"]["seed"] == 1
    one, other = (load_file(folder / out / "model.safetensors")["embed.w"] for out in ("out", "again"))
    assert (one.dtype, other.dtype) == (torch.float16, torch.float32)
    assert not torch.allclose(one.float(), other, atol=1e-2)


def test_set_takes_settings_in_yaml(folder):
    models = [f"{name}.safetensors" for name in ("base", "a", "b")]
    gradient = ("--set", "scale=[{filter: mlp, value: [0, 1]}, {value: 0.5}]", "--set", "weights=[1, {filter: w, value: 3}]")
    assert call(*models, "--method", "mean", *gradient, "-o", "out.safetensors").exit_code == 0
    base, a, b = (load_file(name) for name in models)
    merged = load_file("out.safetensors")
    for name, scale in zip(NAMES, [0.5, 0.5, 0, 0.5, 1], strict=True):
        tau = (a[name] - base[name] + 3 * (b[name] - base[name])) / 4
        torch.testing.assert_close(merged[name], base[name] + scale * tau)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "BASE and RUNS"),
        (("base.safetensors",), "no RUNS"),
        (("base.safetensors", "a.safetensors", "--config", "c.yaml"), "--config replaces BASE, RUNS and --method"),
        (("--method", "ties", "--config", "c.yaml"), "--method ties"),
        (("base.safetensors", "a.safetensors", "--set", "runs.steps=3"), "`runs.steps` of tall-mask"),
        (("base.safetensors", "a.safetensors", "--set", "scale"), "--set takes KEY=VALUE"),
        (("base.safetensors", "a.safetensors", "--set", "scale=[1"), "not a value in YAML: --set scale"),
        (("base.safetensors", "a.safetensors", "--method", "mean", "--seed", "1"), "`seed` of mean"),
    ],
)
def test_the_command_explains_itself(folder, arguments, message):
    (folder / "c.yaml").write_text(yaml.safe_dump(config()))
    done = call(*arguments, "-o", "out")
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert not (folder / "out").exists()
