"""A run that is added later gives the bytes of merging all at once."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emomerge.cli import main


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(20, 30, generator=generator), "b.bias": torch.randn(7, generator=generator)}
    save_file(base, "base.safetensors")
    names = [f"{name}.safetensors" for name in ("one", "two", "three", "four")]
    shared = {name: torch.randn(t.shape, generator=generator) for name, t in base.items()}
    for name in names:
        moved = {n: t + 0.1 * (shared[n] + torch.randn(t.shape, generator=generator)) for n, t in base.items()}
        save_file(moved, name)
    return names


def same_model(one, other):
    for name in ("model.safetensors", "merge.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("mean",),
        ("task-arithmetic", "--scale", 0.4, "--dtype", "bfloat16", "--rounding", "stochastic"),
        ("tall-mask", "--set", "lambda=0.3"),
        ("tall-mask", "--set", "reference=sum", "--save-masks"),
        ("ties", "--density", 0.3),
        ("model-stock",),
        ("dare-linear", "--seed", 1),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_adding_runs_later_changes_no_bit(runs, tmp_path, options):
    method = ("--method", *options)
    assert call("merge", "base.safetensors", *runs[:2], *method, "-o", "old").exit_code == 0
    assert call("merge", "base.safetensors", *runs, *method, "-o", "whole").exit_code == 0
    result = call("merge", "--extend", "old", *runs[2:], "-o", "new")
    assert result.exit_code == 0, result.output
    same_model(tmp_path / "whole", tmp_path / "new")
    incremental = options[0] in ("mean", "task-arithmetic", "tall-mask")
    assert ("makes its choices from scratch" in result.stderr) == (not incremental)
    assert not torch.equal(load_file("old/model.safetensors")["b.bias"], load_file("new/model.safetensors")["b.bias"])


def test_weights_are_given_for_all(runs, tmp_path):
    weighted = ("--method", "mean", "--weight", 1, "--weight", 2)
    assert call("merge", "base.safetensors", *runs[:2], *weighted, "-o", "old").exit_code == 0
    result = call("merge", "--extend", "old", runs[2], "-o", "new")
    assert result.exit_code == 2
    assert "found 1.0, 2.0; give all 3 runs one: --weight, 3 times" in result.stderr
    assert call("merge", "--extend", "old", runs[2], *weighted[2:], "-o", "new").exit_code == 2
    assert call("merge", "--extend", "old", runs[2], *weighted[2:], "--weight", 3, "-o", "new").exit_code == 0
    assert call("merge", "base.safetensors", *runs[:3], *weighted, "--weight", 3, "-o", "whole").exit_code == 0
    same_model(tmp_path / "whole", tmp_path / "new")


def test_what_cannot_be_extended(runs, tmp_path):
    assert call("merge", "base.safetensors", *runs[:2], "--method", "slerp", "-o", "old").exit_code == 0
    for arguments, words in (
        (("--extend", "old"), "--extend needs the RUNS to add"),
        (("--extend", "old", runs[2], "--method", "mean"), "--extend repeats what the record says; found --method"),
        (("--extend", "old", runs[2]), "slerp"),
        (("--extend", "old", "absent.safetensors"), "absent.safetensors"),
    ):
        result = call("merge", *arguments, "-o", "new")
        assert result.exit_code == 2
        assert words in result.stderr
    tensors = load_file(runs[0])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, runs[0])
    result = call("merge", "--extend", "old", runs[2], "-o", "new")
    assert f"{runs[0]}, {runs[0]}" in result.stderr
    assert not (tmp_path / "new").exists()


def test_squared_gradients_of_each_run_are_not_stretched(runs):
    information = [name.replace(".", "-f.") for name in runs[:2]]
    for name in information:
        save_file({n: t.square() for n, t in load_file("base.safetensors").items()}, name)
    fisher = ("--method", "fisher", "--set", f"information={json.dumps(information)}")
    assert call("merge", "base.safetensors", *runs[:2], *fisher, "-o", "old").exit_code == 0
    assert call("merge", "--again", "old", "-o", "again").exit_code == 0
    result = call("merge", "--extend", "old", runs[2], "-o", "new")
    assert result.exit_code == 2
    assert "names files of each of its runs: `information`" in result.stderr
    save_file(load_file("base.safetensors"), information[0])
    result = call("merge", "--again", "old", "-o", "again", "--force")
    assert result.exit_code == 2
    assert information[0] in result.stderr


def test_squared_gradients_of_run_directories_come_with_the_runs(runs, tmp_path):
    for name in runs[:3]:
        folder = tmp_path / name.removesuffix(".safetensors")
        (folder / "model").mkdir(parents=True)
        save_file(load_file(name), folder / "model/model.safetensors")
        save_file({n: t.square() for n, t in load_file(name).items()}, folder / "fisher.safetensors")
        (folder / "run.json").write_text('{"artefact": "model"}')
    assert call("merge", "base.safetensors", "one", "two", "--method", "fisher", "-o", "old").exit_code == 0
    assert call("merge", "base.safetensors", "one", "two", "three", "--method", "fisher", "-o", "whole").exit_code == 0
    assert call("merge", "--extend", "old", "three", "-o", "new").exit_code == 0
    same_model(tmp_path / "whole", tmp_path / "new")
    save_file(load_file("base.safetensors"), "two/fisher.safetensors")
    assert "two/fisher.safetensors" in call("merge", "--again", "old", "-o", "again").stderr
