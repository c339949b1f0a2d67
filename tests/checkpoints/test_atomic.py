"""Outputs appear completely or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from emomerge.checkpoints import (
    Checkpoint,
    MemoryCheckpoint,
    new_folder,
    open_checkpoint,
    sha256,
    write_checkpoint,
    write_json,
    write_text,
)
from emomerge.checkpoints import atomic as atomic_module
from emomerge.errors import BadInput

SOME = MemoryCheckpoint({"a": torch.ones(1000), "b": torch.ones(1000)}, source="some")
OUTS = ["out", "out.safetensors"]


class Failing(MemoryCheckpoint):
    """Raises when its last tensor is asked for."""

    error: BaseException = KeyboardInterrupt()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "b":
            raise self.error
        return super().__getitem__(name)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_a_failure_leaves_nothing(out, error, tmp_path):
    failing = Failing(SOME)
    failing.error = error
    with pytest.raises(type(error)):
        write_checkpoint(failing, tmp_path / "deep" / "er" / out)
    assert left(tmp_path) == []


@pytest.mark.parametrize("out", OUTS)
def test_a_failure_leaves_the_old_output(out, tmp_path):
    write_checkpoint(SOME, tmp_path / out)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Failing(SOME), tmp_path / out, force=True)
    assert left(tmp_path) == [out]
    assert torch.equal(open_checkpoint(tmp_path / out)["a"], SOME["a"])


@pytest.mark.parametrize("out", OUTS)
def test_force_is_required_to_replace_and_replaces_everything(out, tmp_path):
    write_checkpoint(SOME, tmp_path / out, max_shard_size=4000)
    with pytest.raises(BadInput, match="--force"):
        write_checkpoint(SOME, tmp_path / out)
    write_checkpoint(MemoryCheckpoint({"new": torch.zeros(2)}), tmp_path / out, force=True)
    assert open_checkpoint(tmp_path / out).names() == ("new",)
    assert left(tmp_path) == [out]
    if out == "out":
        assert left(tmp_path / out) == ["model.safetensors"]


def test_a_checkpoint_may_be_rewritten_in_place(tmp_path):
    write_checkpoint(SOME, tmp_path / "out")
    write_checkpoint(open_checkpoint(tmp_path / "out"), tmp_path / "out", dtype="bfloat16", force=True)
    assert open_checkpoint(tmp_path / "out")["a"].dtype == torch.bfloat16


def test_force_never_replaces_the_working_directory_or_an_input(tmp_path, monkeypatch):
    write_checkpoint(SOME, tmp_path / "models" / "base")
    with pytest.raises(BadInput, match="refusing"):
        write_checkpoint(open_checkpoint(tmp_path / "models" / "base"), tmp_path / "models", force=True)
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(BadInput, match="refusing"):
        write_checkpoint(SOME, tmp_path, force=True)
    assert open_checkpoint(tmp_path / "models" / "base").names() == SOME.names()


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fills_up_is_bad_input(out, number, tmp_path):
    failing = Failing(SOME)
    failing.error = OSError(number, os.strerror(number))
    with pytest.raises(BadInput) as caught:
        write_checkpoint(failing, tmp_path / out)
    assert str(tmp_path / out) in str(caught.value)
    if number == errno.ENOSPC:
        assert "8 kB" in str(caught.value)
        assert "free" in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("out", OUTS)
def test_free_space_is_checked_before_anything_is_computed(out, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    failing = Failing(SOME)
    failing.error = AssertionError("computed")
    with pytest.raises(BadInput, match=r"disk is full.*8 kB.*1 kB free"):
        write_checkpoint(failing, tmp_path / out)
    assert left(tmp_path) == []


def test_a_full_disk_is_bad_input_for_small_files_too(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadInput, match="disk is full"):
        write_json(tmp_path / "x", {"new": 1})
    assert (tmp_path / "x").read_text() == "old"
    assert left(tmp_path) == ["x"]


KILLED = """
import os, signal, sys, torch
from emomerge.checkpoints import MemoryCheckpoint, write_checkpoint

class Killed(MemoryCheckpoint):
    def __getitem__(self, name):
        if name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(name)

write_checkpoint(Killed({"a": torch.ones(1000), "b": torch.ones(1000)}), sys.argv[1], force=True)
"""


def test_leftovers_of_a_killed_process_are_removed_at_the_next_write(tmp_path):
    outs = [tmp_path / out for out in OUTS]
    kept = tmp_path / ".out.another-machine-1-0.tmp"
    kept.mkdir()
    for out in outs:
        done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=dict(os.environ), check=False)
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
    assert len(left(tmp_path)) == 3
    for out in outs:
        write_checkpoint(SOME, out)
    assert left(tmp_path) == sorted([kept.name, *OUTS])


def test_an_output_moved_aside_by_a_killed_process_is_restored(tmp_path, monkeypatch):
    write_checkpoint(SOME, tmp_path / "out")
    monkeypatch.setattr(atomic_module, "is_alive", lambda pid: pid != 123456)
    (tmp_path / "out").rename(tmp_path / f".out.{atomic_module.socket.gethostname()}-123456-0.old")
    with pytest.raises(BadInput, match="already exists"):
        write_checkpoint(SOME, tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_new_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert left(tmp_path) == []
    with new_folder(tmp_path / "x") as folder:
        (folder / "whole").write_text("all")
        assert not (tmp_path / "x").exists()
    assert left(tmp_path / "x") == ["whole"]
    with pytest.raises(BadInput), new_folder(tmp_path / "x"):
        raise AssertionError
    with new_folder(tmp_path / "x", force=True) as folder:
        (folder / "other").write_text("")
    assert left(tmp_path / "x") == ["other"]


def test_a_path_that_cannot_be_created_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        write_checkpoint(SOME, tmp_path / "file" / "out")
    with pytest.raises(BadInput):
        write_text(tmp_path / ("n" * 300), "")


def test_text_json_and_hashes(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    write_text(tmp_path / "abc", "abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_not_written(dtype, value, tmp_path):
    bad = torch.ones(100)
    bad[57] = value
    with pytest.raises(BadInput, match=r"the run, layer\.bad"):
        write_checkpoint(MemoryCheckpoint({"layer.bad": bad.to(dtype)}, source="the run"), tmp_path / "out")
    assert left(tmp_path) == []


def test_overflow_is_distinguished_from_nan(tmp_path):
    with pytest.raises(BadInput, match=r"too large.*float16"):
        write_checkpoint(MemoryCheckpoint({"w": torch.tensor([1e6])}), tmp_path / "out", dtype="float16")


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    class Liar(MemoryCheckpoint):
        def __getitem__(self, name: str) -> torch.Tensor:
            return torch.zeros(3)

    assert issubclass(Liar, Checkpoint)
    with pytest.raises(BadInput, match="shape"):
        write_checkpoint(Liar(SOME), tmp_path / "out")
