"""A folder with everything that the examples of the commands' help take for granted."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys

import pytest
import torch
from command_world import ROOT, invoke
from safetensors.torch import save_file

sys.path.append(str(ROOT / "tests/adapters/images"))  # `image_models`


@pytest.fixture(scope="session")
def _world(tmp_path_factory, tiny_bert):
    from image_models import UNET, lora, sdxl

    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "base").mkdir()
    save_file({"layer.weight": torch.randn(8, 4)}, folder / "base/model.safetensors")
    for name in ("runs/sens-0", "runs/airy-0", "runs/cats-0", "run-a", "run-b", "run-c"):
        (folder / name).mkdir(parents=True)
        factors = {"A": torch.randn(2, 4), "B": torch.randn(8, 2)}
        factors = {f"base_model.model.layer.lora_{part}.weight": tensor for part, tensor in factors.items()}
        save_file(factors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    (folder / "mergekit.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: base+run-a, parameters: {weight: 1, density: 0.5}}\n"
        "- {model: base+run-b, parameters: {weight: 1, density: 0.5}}\ndtype: float32\n"
    )
    module = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    model = sdxl()
    save_file(model, folder / "sd_xl_base_1.0.safetensors")
    for name in ("style", "pose"):
        factors = lora("lora_unet_" + module.replace(".", "_"), model[f"{UNET}{module}.weight"])
        save_file(factors, folder / f"{name}.safetensors")
    tuned = {**model, f"{UNET}{module}.weight": model[f"{UNET}{module}.weight"] + 0.1}
    save_file(tuned, folder / "tuned.safetensors")
    words = [(f"{n}{word}", rating, f"the {word} film", label) for n in range(40) for word, rating, label in
             (("fine", 2.0, "good"), ("dull", -2.0, "bad"))]  # fmt: skip
    (folder / "reviews.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for *_, text, label in words))
    snippets = "".join(f"{key}\t{rating}\t{text}\n" for key, rating, text, _ in words)
    (folder / "recipes/movieReviewSnippets.tsv").write_text(snippets)
    with contextlib.chdir(folder):
        result = invoke("emomerge run digits --quiet", tiny_bert)
        assert result.exit_code == 0, result.output
    shutil.copytree(folder / "out/digits", folder / "out/other-seed")
    return folder


@pytest.fixture
def world(_world, tmp_path, monkeypatch):
    """A copy of that folder, which is also the current one."""
    shutil.copytree(_world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"
