"""Inputs stay as they are while a command reads them, and no output takes their place."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import open_checkpoint, write_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.numerics.hashing import Digests, sha256
from emomerge.watch import watched_inputs


@pytest.fixture
def models(tmp_path):
    """A base and two runs, each in a folder."""
    for number, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((4, 4), float(number)), "b": torch.ones(3)}, tmp_path / name / "model.safetensors")
    return tmp_path


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize("out", ["base", "two", "one/model.safetensors", "."])
def test_force_never_replaces_an_input(models, out):
    before = {path: path.read_bytes() for path in models.rglob("*.safetensors")}
    result = call("merge", models / "base", models / "one", models / "two", "-o", models / out, "--force")
    assert result.exit_code == 2 and "refusing to replace" in result.stderr
    assert {path: path.read_bytes() for path in models.rglob("*.safetensors")} == before


def test_force_never_replaces_an_input_behind_a_link(models):
    (models / "link").symlink_to(models / "one", target_is_directory=True)
    result = call("merge", models / "base", models / "link", "-o", models / "one", "--force", "--method", "mean")
    assert result.exit_code == 2 and "refusing to replace an input" in result.stderr


@pytest.mark.parametrize("change", ["replaced", "rewritten", "deleted"])
def test_an_input_that_changes_during_the_work_is_noticed(models, change):
    file = models / "one" / "model.safetensors"

    def interfere(*_):
        if change == "deleted":
            file.unlink(missing_ok=True)
        elif change == "replaced":
            save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, models / "new")
            (models / "new").replace(file)
        else:
            os.utime(file, ns=(1, 1))

    with watched_inputs(), pytest.raises(BadInput, match=r"an input was changed while it was read: .*one/model\.safetensors"):
        write_checkpoint(open_checkpoint(models / "one"), models / "out", progress=interfere)
    assert sorted(path.name for path in models.iterdir()) == ["base", "one", "two"]


def test_a_hash_made_of_another_file_is_not_used(models, monkeypatch):
    file = models / "one" / "model.safetensors"
    digests = Digests([file])
    first = digests(file)
    save_file({"a": torch.zeros(9)}, models / "new")
    (models / "new").replace(file)
    assert digests(file) == sha256(file) != first


def test_a_folder_is_exchanged_in_one_step(models, monkeypatch):
    seen = []
    original = os.rename

    def watched(src, dst, **more):
        seen.append((models / "out").exists())
        return original(src, dst, **more)

    write_checkpoint(open_checkpoint(models / "one"), models / "out")
    monkeypatch.setattr(os, "rename", watched)
    write_checkpoint(open_checkpoint(models / "two"), models / "out", force=True)
    assert all(seen), "there was a moment without the folder"
    assert load_file(models / "out" / "model.safetensors")["a"][0, 0] == 2
    assert not [path for path in models.iterdir() if path.name.startswith(".")]


TRUNCATED = """
import os, sys, threading, time
from emomerge.merging import native
from emomerge.cli import main
from emomerge.checkpoints import reader

file, sizes = sys.argv[1], []
mapped, read = reader._mapped, reader._read

def shortened(function):
    def get(path, header, start, size):
        data = function(path, header, start, size)
        if str(path) == file and not sizes:
            sizes.append(size)
            os.truncate(file, 8192)
        return data
    return get

reader._mapped, reader._read = shortened(mapped), shortened(read)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("environment", [{}, {"EMOMERGE_NATIVE": "0"}], ids=["with kernels", "without"])
@pytest.mark.parametrize(
    "command", ["merge --method mean", "merge --method ties", "bake", "inspect"], ids=["mean", "ties", "bake", "inspect"]
)
def test_an_input_that_is_truncated_while_it_is_mapped_is_named(tmp_path, command, environment):
    """Each tensor fills many pages, and the file is cut in the middle of the work."""
    values = torch.arange(200 * 400.0).view(200, 400)
    for number, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file({f"{key}.weight": values + number for key in "abc"}, tmp_path / name / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["b"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.ones(1, 400), "lora_B": torch.ones(200, 1)}
    save_file(
        {f"base_model.model.b.{name}.weight": factor for name, factor in factors.items()},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    name, *options = command.split()
    given = {"merge": ["base", "one", "two", "-o", "out"], "bake": ["base", "adapter", "-o", "out"], "inspect": ["base", "one"]}
    file = tmp_path / ("base" if name == "bake" else "one") / "model.safetensors"
    line = [sys.executable, "-c", TRUNCATED, file.relative_to(tmp_path), name, *given[name], *options]
    found = subprocess.run(
        line, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 2, (found.returncode, found.stderr[-2000:])
    assert "an input was changed while it was read" in found.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".*.tmp")]
