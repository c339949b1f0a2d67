"""What works with the core installation alone; CI runs this file in an environment that has nothing else.

Where optional packages are installed, each test runs in a process that cannot import them.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from emomerge.extras import EXTRAS, installed

PRELUDE = """
import json, sys, torch
from pathlib import Path
for module in %(blocked)r:
    sys.modules[module] = None
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in %(blocked)r else original(name, package)
from click.testing import CliRunner
from safetensors.torch import save_file
import emomerge
from emomerge.cli import main

def call(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result

torch.manual_seed(0)
base = {"layer.weight": torch.randn(6, 4), "layer.bias": torch.randn(6)}
save_file(base, "base.safetensors")
for name in ("a", "b"):
    save_file({key: value + 0.1 * torch.randn_like(value) for key, value in base.items()}, f"{name}.safetensors")
Path("lora").mkdir()
config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
Path("lora/adapter_config.json").write_text(json.dumps(config))
factors = {"A": torch.randn(2, 4), "B": torch.randn(6, 2)}
save_file({f"base_model.model.layer.lora_{k}.weight": v for k, v in factors.items()}, "lora/adapter_model.safetensors")
delta = 2 * factors["B"] @ factors["A"]
"""


@pytest.fixture
def core(tmp_path):
    """Runs a piece of code in an empty folder, in a process without optional packages."""
    optional = [module for packages in EXTRAS.values() for module in packages if module not in ("jinja2", "filelock")]
    blocked = [module for module in optional if installed(module)]  # jinja2 and filelock come with torch

    def run(code: str) -> None:
        file = tmp_path / "core_script.py"
        file.write_text(PRELUDE % {"blocked": blocked} + textwrap.dedent(code))
        result = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    return run


def test_optimizers_train(core):
    core("""
        from emomerge.optim import OPTIMIZERS
        x, y = torch.randn(32, 4), torch.randn(32, 1)
        for entry in OPTIMIZERS.values():
            model = torch.nn.Linear(4, 1)
            optimizer = entry.load()(model.parameters())
            before = model.weight.detach().clone()
            for _ in range(20):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad(); optimizer.observe(loss); loss.backward(); optimizer.step()
            assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
    """)


def test_adapters_are_baked(core):
    core("""
        baked = emomerge.bake("base.safetensors", "lora")
        torch.testing.assert_close(baked["layer.weight"], base["layer.weight"] + delta)
        call("bake", "base.safetensors", "lora", "-o", "baked")
        written = emomerge.open_checkpoint("baked")
        torch.testing.assert_close(written["layer.weight"], base["layer.weight"] + delta)
    """)


def test_runs_and_adapters_are_merged(core):
    core("""
        call("merge", "base.safetensors", "a.safetensors", "b.safetensors", "--method", "mean", "-o", "merged")
        a, b = (emomerge.open_checkpoint(f"{name}.safetensors")["layer.weight"] for name in "ab")
        torch.testing.assert_close(emomerge.open_checkpoint("merged")["layer.weight"], (a + b) / 2)
        call("merge", "base.safetensors", "a.safetensors", "lora", "--method", "ties", "-o", "mixed.safetensors")
        for name in ("tall-mask", "ties", "slerp", "tsv", "dare-linear"):
            runs = ["a.safetensors", "b.safetensors"]
            merged = emomerge.merge(emomerge.open_checkpoint("base.safetensors"), runs, method=name)
            assert merged["layer.weight"].isfinite().all()
    """)


def test_files_are_inspected_and_compared(core):
    core("""
        assert json.loads(call("inspect", "base.safetensors", "--json").stdout)
        assert json.loads(call("inspect", "a.safetensors", "b.safetensors", "--json").stdout)
        assert json.loads(call("inspect", "lora", "--json").stdout)
    """)


def test_a_plain_module_is_probed(core):
    core("""
        model = torch.nn.Linear(4, 1)
        batches = [(torch.randn(16, 4), torch.randn(16, 1))]
        loss = lambda model, batch: ((model(batch[0]) - batch[1]).square().mean(), len(batch[0]))
        found = emomerge.probe(model, loss, batches, ["gaussian", "hessian"])
        assert found.keys() == {"gaussian", "hessian"}
    """)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [(["run", "digits"], "train"), (["train-all", "digits"], "train"), (["report", "out"], "report"),
     (["probe", "digits", "a.safetensors", "-o", "out"], "train")],
)  # fmt: skip
def test_other_commands_name_the_extra(core, arguments, extra):
    core(f"""
        line = call(*{arguments!r}, status=2).stderr.strip()
        assert line.startswith("emomerge: emomerge {arguments[0]} needs ") and "emomerge[{extra}" in line
        assert len(line.splitlines()) == 1
        assert not Path("out").exists()
    """)


@pytest.mark.skipif(installed("transformers"), reason="transformers is installed")
def test_without_transformers_a_renamed_tensor_names_the_extra(core):
    core("""
        from emomerge.adapters.naming import BaseNames
        Path("hf").mkdir(); save_file(base, "hf/model.safetensors"); Path("hf/config.json").write_text('{"model_type": "bert"}')
        names = BaseNames(emomerge.open_checkpoint("hf"))
        assert names.find("layer.weight") == "layer.weight" and names.find("other.weight") is None
        try:
            names.model
        except emomerge.MissingExtra as error:
            assert "emomerge[train]" in str(error)
        else:
            raise AssertionError
    """)
