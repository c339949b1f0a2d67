"""`emomerge merge --reestimate`: running statistics of batch norm for the merged weights, on a recipe's training data."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from emomerge.cli import main
from emomerge.experiment.measure import Measurer
from emomerge.recipe import load_recipe
from emomerge.training import Context

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")


def test_statistics_are_those_of_the_training_data_under_the_merged_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=10))
    model.save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        run = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in run.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        run.save_pretrained(tmp_path / name)
    recipe = {
        "name": "resnet", "base": {"model": str(tmp_path / "base")}, "adapter": {"kind": "full"},
        "task": {"kind": "image-classification", "train": "digits", "limit": 120, "eval_fraction": 0.5, "image_size": 8},
        "merge": [{"method": "mean"}], "probe": {"preset": "quick", "batch_size": 16, "batches": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["merge", *(str(tmp_path / name) for name in ("base", "one", "two")), "--method", "mean", "--recipe",
                 str(tmp_path / "recipe.yaml"), "-o"]  # fmt: skip
    for out, options in (("plain", []), ("estimated", ["--reestimate"]), ("again", ["--reestimate"])):
        result = CliRunner().invoke(main, [*arguments, str(tmp_path / out), *options, "--quiet"])
        assert result.exit_code == 0, result.output
    plain, estimated, again = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "estimated", "again"))
    statistics = {name for name in plain if ".running_" in name}
    assert len(statistics) >= 8 and all(torch.equal(again[name], tensor) for name, tensor in estimated.items())
    for name, tensor in plain.items():
        assert torch.equal(tensor, estimated[name]) != (name in statistics), name
    assert json.loads((tmp_path / "estimated/merge.json").read_text())["output"]["reestimate"] is True
    context = Context(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "base", "base")
    for name, (mean, variance) in _seen(tmp_path / "estimated", Measurer(context, None).batches("train")).items():
        torch.testing.assert_close(estimated[f"{name}.running_mean"], mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(estimated[f"{name}.running_var"], variance, atol=1e-5, rtol=1e-4)


def _seen(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean over the batches of the mean and variance of what each batch norm gets in training."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).train()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen.setdefault(name, []).append(
                    (given[0].detach().mean((0, 2, 3)), given[0].detach().transpose(0, 1).flatten(1).var(dim=1))
                )
            )
    for batch in batches:
        model(pixel_values=batch["pixel_values"])
    return {name: tuple(torch.stack(each).mean(dim=0) for each in zip(*some, strict=True)) for name, some in seen.items()}  # type: ignore[misc]
