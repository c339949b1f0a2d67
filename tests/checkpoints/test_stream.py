"""Files written from buffers that are used again: past the cache or through it, the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, stream, write_checkpoint
from emomerge.checkpoints.stream import ALIGNMENT, Stream

PARTS = [bytes([number]) * size for number, size in enumerate((5, 0, 70_001, ALIGNMENT, 3, 200_000, 1, 40_000, 40_000, 17))]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 3 * ALIGNMENT)
    monkeypatch.setattr(stream, "KEPT", 10 * ALIGNMENT)
    monkeypatch.setattr(stream, "FLUSHED", 9 * ALIGNMENT)
    monkeypatch.setattr(stream, "LARGE", 0)


def written(path: Path, *, hashed: bool = True) -> str:
    with Stream(path, sum(map(len, PARTS)), hashed=hashed) as out:
        for part in PARTS:
            out.put(part)
        out.finish()
    assert path.read_bytes() == b"".join(PARTS)
    return out.sha256


def test_past_the_cache(tmp_path: Path) -> None:
    assert written(tmp_path / "file") == hashlib.sha256(b"".join(PARTS)).hexdigest()
    assert written(tmp_path / "other", hashed=False) == ""


def test_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LARGE", 2**40)
    assert written(tmp_path / "file") == hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no O_DIRECT")
def test_a_file_system_that_does_not_open_files_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    assert written(tmp_path / "file") == hashlib.sha256(b"".join(PARTS)).hexdigest()


def test_a_file_system_that_wants_another_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote, calls = stream._write_all, []

    def refusing(file: Any, data: memoryview) -> None:
        calls.append(len(data))
        if len(calls) == 2:
            wrote(file, data[:ALIGNMENT])
            raise OSError(errno.EINVAL, "Invalid argument")
        wrote(file, data)

    monkeypatch.setattr(stream, "_write_all", refusing)
    if not stream._opened(tmp_path / "probe", 1)[1]:
        pytest.skip("no direct writing here")
    assert written(tmp_path / "file") == hashlib.sha256(b"".join(PARTS)).hexdigest()
    assert len(calls) > 3


def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "_write_all", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file")


def test_a_checkpoint_of_tensors_larger_than_the_buffers(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50_000), "b": torch.arange(7), "c": torch.randn(3, 30_001).half(), "d": torch.tensor(True)}
    hashes = write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "model.safetensors")
    assert hashes == {"model.safetensors": hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()}
    read = open_checkpoint(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    other = write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "other.safetensors", hashed=False)
    assert other == {"other.safetensors": ""}
    assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
