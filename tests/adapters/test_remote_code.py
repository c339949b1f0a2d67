"""Code that a base brings is never run unless the recipe trusts it, and no library may ask for permission on the terminal."""

import ast
import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import emomerge
from emomerge import adapters
from emomerge.adapters.naming import BaseNames
from emomerge.checkpoints import open_checkpoint

LIBRARIES = {"transformers", "peft", "datasets", "tokenizers", "diffusers"}
ASKING = {"from_pretrained", "from_config", "pipeline"}
"""Functions of these libraries that may run code of a model's folder."""
FOLDERS = [
    Path(emomerge.__file__).parent,
    Path(emomerge.__file__).parents[1] / "recipes",
    Path(emomerge.__file__).parents[1] / "benchmarks",
]


def _calls(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def _asks(name, call):
    """Whether a call may run foreign code, or load a file that holds pickled objects, without a word about it."""
    if name in ASKING:
        return "trust_remote_code" not in {keyword.arg for keyword in call.keywords}
    if name == "load" and isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("torch", "pickle"):
        return True
    return name in ("get_class_from_dynamic_module", "load_repo_checkpoint")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_call_into_a_library_says_whether_it_trusts_the_model(folder):
    asking = [
        f"{file.name}:{call.lineno} {name}"
        for file in sorted(folder.rglob("*.py"))
        for name, call in _calls(file.read_text())
        if _asks(name, call)
    ]
    own = {"evidence.py", "flow_matching.py"}  # models that the benchmark itself has written
    assert [each for each in asking if each.partition(":")[0] not in own] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("AutoModel.from_pretrained(x)", 1),
        ("AutoModel.from_config(c, trust_remote_code=False)", 0),
        ("transformers.pipeline('x')", 1),
        ("torch.load(f)", 1),
        ("json.load(f)", 0),
    ],
)
def test_the_inspection_finds_what_it_looks_for(code, found):
    assert sum(_asks(*each) for each in _calls(code)) == found


@pytest.fixture
def trap(tmp_path):
    """A base whose configuration names code that leaves a file behind, and an adapter of it."""
    base, adapter, marker = tmp_path / "base", tmp_path / "adapter", tmp_path / "ran"
    for folder in (base, adapter):
        folder.mkdir()
    auto_map = {"AutoConfig": "trap.TrapConfig", "AutoModel": "trap.TrapModel", "AutoModelForCausalLM": "trap.TrapModel"}
    (base / "config.json").write_text(json.dumps({"model_type": "trap", "architectures": ["TrapModel"], "auto_map": auto_map}))
    (base / "trap.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class TrapConfig(PretrainedConfig):\n    model_type = 'trap'\n"
        "class TrapModel(PreTrainedModel):\n    config_class = TrapConfig\n"
    )
    save_file({"transformer.h.0.q_proj.weight": torch.randn(4, 4)}, base / "model.safetensors")
    prefix = "base_model.model.h.0.q_proj.lora_"
    save_file(
        {f"{prefix}A.weight": torch.ones(1, 4), f"{prefix}B.weight": torch.ones(4, 1)}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return base, adapter, marker


def test_the_model_of_a_base_with_its_own_code_is_unknown(trap, monkeypatch):
    base, adapter, marker = trap
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a library asked on the terminal"))
    assert BaseNames(open_checkpoint(base)).model is None
    assert len(adapters.bake(base, adapter).touched()) == 1
    assert not marker.exists()


def test_an_answer_of_yes_to_every_question_runs_nothing(trap, tmp_path):
    base, adapter, marker = trap
    command = [sys.executable, "-m", "emomerge", "bake", base, adapter, "-o", tmp_path / "out", "--quiet"]
    done = subprocess.run([str(part) for part in command], input="y\n" * 1000, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists() and (tmp_path / "out" / "model.safetensors").is_file()
