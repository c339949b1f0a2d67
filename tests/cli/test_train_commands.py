"""The command lines for sd-scripts."""

from __future__ import annotations

import ast
import shlex

import torch
from click.testing import CliRunner
from torch import nn

import emomerge.optim
from emomerge.cli import main

ARGUMENTS = ["train-commands", "sdxl", "--base", "my models/xl.safetensors", "--data", "set.toml", "-o", "out", "--rank", "6"]


def lines() -> list[list[str]]:
    result = CliRunner().invoke(main, [*ARGUMENTS, "--preset", "v3.8"])
    assert result.exit_code == 0, result.output
    return [shlex.split(line) for line in result.output.splitlines()]


def test_the_five_runs_differ_in_the_optimizer_only() -> None:
    *runs, merge = lines()
    assert len(runs) == 5
    own = ("--output_name=", "--optimizer_type=")
    common = {tuple(word for word in run if not word.startswith(own)) for run in runs}
    assert len(common) == 1
    words = common.pop()
    assert {"--network_dim=6", "--network_alpha=3", "conv_dim=6", "conv_alpha=3", "--max_train_steps=2000"} <= set(words)
    assert "--pretrained_model_name_or_path=my models/xl.safetensors" in words
    names = [next(word.partition("=")[2] for word in run if word.startswith("--output_name=")) for run in runs]
    assert merge[:3] == ["emomerge", "merge", "my models/xl.safetensors"]
    assert merge[3:8] == [f"out/{name}.safetensors" for name in names]


def test_sd_scripts_can_make_the_optimizers() -> None:
    """As its `get_optimizer` does: the class by its path, each argument split at `=` and evaluated as a literal."""
    classes = set()
    for run in lines()[:-1]:
        module, _, name = next(word for word in run if word.startswith("--optimizer_type=")).partition("=")[2].rpartition(".")
        assert module == "emomerge.optim"
        start = run.index("--optimizer_args") + 1
        end = next(place for place in range(start, len(run)) if run[place].startswith("--"))
        options = {key: ast.literal_eval(value) for key, value in (word.split("=") for word in run[start:end])}
        assert options == {"capture_loss": True, "preset": "v3.8"}
        layer = nn.Linear(3, 2)
        optimizer = getattr(emomerge.optim, name)([{"params": layer.parameters(), "lr": 1.0}], lr=1.0, **options)
        before = layer.weight.detach().clone()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, before)
        classes.add(name)
    assert len(classes) == 5
