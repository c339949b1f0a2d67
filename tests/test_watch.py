"""Inputs stay as they are while a command reads them, and no output takes their place."""

import os

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
