"""What `emomerge merge` writes: rounding, what it loses, and a record from which the merge can be repeated."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import MemoryCheckpoint, RoundingLoss, open_checkpoint, write_checkpoint
from emomerge.cli import main
from emomerge.merging import merge
from emomerge.numerics.rounding import round_to

NAMES = ("a.weight", "b.bias", "c.weight")


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(result, *words):
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A bfloat16 base and runs that are near to it, in folders; the working directory."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (60, 70), "b.bias": (5,), "c.weight": (30, 9)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    write_checkpoint(MemoryCheckpoint(base), "base")
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    for run in ("one", "two", "three"):
        tensors = {n: t.float() + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        write_checkpoint(MemoryCheckpoint(tensors), run)
    return tmp_path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_rounding_takes(models, dtype, rounding):
    result = call("merge", "base", "one", "two", "--dtype", dtype, "--rounding", rounding, "--seed", 3, "-o", "out")
    if rounding == "nearest":
        fails(result, "`seed` of tall-mask")  # the seed of nothing
        result = call("merge", "base", "one", "two", "--dtype", dtype, "-o", "out")
    assert result.exit_code == 0, result.output
    base, merged = open_checkpoint("base"), merge("base", ["one", "two"])
    new = load_file("out/model.safetensors")
    old = {name: base[name].float() for name in NAMES}
    tau = {name: merged.delta(name, merged.base) for name in NAMES}
    moved = sum(tau[name].count_nonzero() for name in NAMES)
    same = sum(((tau[n] != 0) & (new[n] == round_to(base[n], new[n].dtype))).sum() for n in NAMES)
    lost = sum((new[n].double() - old[n].double() - tau[n].double()).square().sum() for n in NAMES).sqrt()
    figures = json.loads((models / "out/merge.json").read_text())["rounding_loss"]
    assert figures["unchanged"] == int(same) / int(moved)
    length = sum(t.double().square().sum() for t in tau.values()).sqrt()
    assert figures["relative_error"] == pytest.approx((lost / length).item(), rel=1e-3, abs=1e-6)
    assert "relative error of the task vector" in result.stdout
    if rounding == "nearest":
        assert (figures["unchanged"] > 0.5) == (dtype == "bfloat16")


def test_the_loss_of_a_known_case():
    base = MemoryCheckpoint({"w": torch.tensor([1.0, 1.0, 1.0, 0.0]).bfloat16(), "v": torch.zeros(0)})
    tau = {"w": torch.tensor([2**-10, 2**-7, 0.0, 0.0]), "v": torch.zeros(0)}  # half an ulp of 1 is 2⁻⁸
    loss = RoundingLoss(base)
    for name in base:
        loss.add(base[name], tau[name], (base[name] + tau[name]).to(torch.bfloat16))
    assert loss.figures() == {"unchanged": 0.5, "relative_error": pytest.approx(2**-10 / (2**-14 + 2**-20) ** 0.5, rel=1e-6)}
    assert RoundingLoss(base).figures() == {"unchanged": None, "relative_error": None}


def test_stochastic_rounding_is_seeded_and_independent_of_the_files(models):
    def written(*options):
        folder = f"out{len(list(models.glob('out*')))}"
        arguments = ("--rounding", "stochastic", *options, "-o", folder, "--quiet")
        assert call("merge", "base", "one", "two", "--method", "mean", *arguments).exit_code == 0
        checkpoint = open_checkpoint(folder)
        return torch.cat([checkpoint[name].flatten() for name in NAMES])

    first = written()
    assert torch.equal(first, written("--seed", 0))
    assert torch.equal(first, written("--max-shard-size", 500))
    assert not torch.equal(first, written("--seed", 1))
    exact = merge("base", ["one", "two"], method="mean")
    exact = torch.cat([exact[name].flatten() for name in NAMES])
    assert ((first.float() - exact).abs() <= 2**-7 * exact.abs()).all()
    mean = torch.stack([written("--seed", seed) for seed in range(8)]).double().mean(0)
    nearest = (exact.bfloat16().double() - exact.double()).norm()
    assert (mean - exact.double()).norm() < nearest


def test_a_method_with_a_seed_of_its_own_takes_it_too(models):
    runs = ("merge", "base", "one", "two", "--method", "dare-linear", "--seed", 5)
    for rounding in ("nearest", "stochastic"):
        assert call(*runs, "--rounding", rounding, "-o", rounding).exit_code == 0
        record = json.loads((models / rounding / "merge.json").read_text())
        assert record["params"]["seed"] == record["output"]["seed"] == 5


def test_everything_is_there(models):
    assert call("merge", "base", "one", "two", "--max-shard-size", 6000, "-o", "out").exit_code == 0
    names = {file.name for file in (models / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "merge.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.startswith("model-")]) == 2
    record = json.loads((models / "out/merge.json").read_text())
    digest = hashlib.sha256((models / "one/model.safetensors").read_bytes()).hexdigest()
    assert record["runs"][0] == {"name": "one", "source": "one", "sha256": {"model.safetensors": digest}}
    assert record["base_sha256"].keys() == {"model.safetensors"}
    assert record["diagnostics"]["elements"] == 60 * 70 + 5 + 270
    card = (models / "out/README.md").read_text()
    assert digest in card
    assert "tall-mask" in card
    assert open_checkpoint("out").names() == NAMES


# Again.


def same_files(one, other):
    files, others = (
        sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
        for folder in (one, other)
    )
    assert files == others
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "ties", "--density", 0.3, "--dtype", "float32", "--max-shard-size", 6000),
        ("--method", "dare-ties", "--seed", 4, "--weight", 1, "--weight", 2, "--scale", 0.5),
        ("--method", "mean", "--rounding", "stochastic", "--seed", 2),
        ("--set", "scale=[{filter: a, value: 0.5}, {value: 1}]", "--save-masks"),
        ("--method", "mean", "--as-lora", "auto", "--energy", 0.7, "--allow-partial"),
    ],
    ids=str,
)
def test_a_merge_is_repeated_to_the_byte(models, options):
    assert call("merge", "base", "one", "two", *options, "-o", "out").exit_code == 0
    result = call("merge", "--again", "out/merge.json", "-o", "again")
    assert result.exit_code == 0, result.output
    same_files(models / "out", models / "again")
    assert call("merge", "--again", "out", "-o", "again", "--force").exit_code == 0


def test_a_changed_input_is_named(models):
    assert call("merge", "base", "one", "two", "-o", "out").exit_code == 0
    tensors = load_file("two/model.safetensors")
    tensors["b.bias"][0] += 1
    save_file(tensors, "two/model.safetensors")
    fails(call("merge", "--again", "out", "-o", "again"), "two, model.safetensors", "has changed")
    assert not (models / "again").exists()
    (models / "base/model.safetensors").rename(models / "base/other.safetensors")
    fails(call("merge", "--again", "out", "-o", "again"), "base, model.safetensors", "found no such file")


def test_a_record_that_cannot_be_repeated(models):
    assert call("merge", "base", "one", "two", "-o", "out").exit_code == 0
    fails(call("merge", "--again", "out", "--method", "ties", "-o", "x"), "--again repeats what the record says", "--method")
    fails(call("merge", "base", "--again", "out", "-o", "x"), "--again repeats what the record says")
    fails(call("merge", "--again", "nowhere.json", "-o", "x"), "no record of a merge", "nowhere.json")
    (models / "bad.json").write_text('{"method": "mean", "params": {}, "runs": []}')
    fails(call("merge", "--again", "bad.json", "-o", "x"), "not the record of a merge", "base")
    (models / "old.json").write_text('{"method": "mean", "params": {}, "base": "base", "runs": []}')
    fails(call("merge", "--again", "old.json", "-o", "x"), "lacks the hashes", "merge from scratch")


# Adapters from the command line.


def test_an_adapter_is_written_with_its_figures(models):
    options = ("--method", "mean", "--as-lora", 4, "--allow-partial", "-o", "adapter")
    result = call("merge", "base", "one", "two", *options)
    assert result.exit_code == 0, result.output
    for word in ("a.weight", "b.bias", "left out", "all"):
        assert word in result.stdout
    names = {file.name for file in (models / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "merge.json", "README.md"}
    adapter = json.loads((models / "adapter/merge.json").read_text())["adapter"]
    assert adapter["layers"]["a.weight"]["rank"] == 4
    assert 0 < adapter["energy"] < 1
    assert "library_name: peft" in (models / "adapter/README.md").read_text()
    asked = json.loads(call("merge", "base", "one", *options[:-1], "second", "--json").stdout)
    assert asked["adapter"]["left_out"].keys() == {"b.bias"}


def test_adapter_options_that_make_no_sense(models):
    merging = ("merge", "base", "one", "two", "--method", "mean", "-o", "x")
    fails(call(*merging, "--as-lora", "big"), "--as-lora takes a rank or `auto`")
    fails(call(*merging, "--as-lora", 0), "--as-lora takes a rank or `auto`")
    fails(call(*merging, "--as-lora", 4), "fits into no adapter: b.bias", "--allow-partial")
    fails(call(*merging, "--as-lora", 4, "--energy", 0.9), "--energy belongs to --as-lora auto")
    fails(call(*merging, "--as-lora", "auto", "--energy", 2), "energy")
    fails(call(*merging, "--allow-partial"), "--allow-partial belongs to --as-lora")
    fails(call(*merging[:-1], "x.safetensors", "--as-lora", 4), "--as-lora writes a folder")
    assert not (models / "x").exists()
    result = call(*merging, "--as-lora", "auto", "--max-rank", 2, "--allow-partial")
    assert "2 layers hold less than 99% at --max-rank 2" in result.stderr


# Baking.


def test_baking_rounds_alike(models):
    tensors = {"base_model.model.a.lora_A.weight": torch.randn(2, 70), "base_model.model.a.lora_B.weight": torch.randn(60, 2)}
    (models / "lora").mkdir()
    save_file({name: 1e-2 * tensor for name, tensor in tensors.items()}, models / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (models / "lora/adapter_config.json").write_text(json.dumps(config))
    assert "relative error" in call("bake", "base", "lora", "-o", "near").stdout
    assert call("bake", "base", "lora", "--rounding", "stochastic", "--seed", 1, "-o", "far").exit_code == 0
    near, far = load_file("near/model.safetensors"), load_file("far/model.safetensors")
    assert torch.equal(near["b.bias"], far["b.bias"])
    assert not torch.equal(near["a.weight"], far["a.weight"])
