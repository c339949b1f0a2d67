"""Merges as files: the same bytes however the inputs lie on disk, and after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from emomerge.checkpoints import write_checkpoint
from emomerge.cli import main
from emomerge.merging import merge

SHAPES = {
    "embed.weight": (50, 16),
    "0.weight": (16, 16),
    "0.bias": (16,),
    "column": (9, 1),
    "scalar": (),
    "none": (0, 4),
    "head": (700, 333),
}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(index))
        for index, (name, shape) in enumerate(SHAPES.items())
    }
    found = {name: (t + 0.01 * torch.randn(t.shape, generator=generator) * bool(seed)).bfloat16() for name, t in base.items()}
    return found | {"positions": torch.arange(7), "scales": torch.ones(3).to(torch.float8_e4m3fn)}


def save(state: dict[str, Tensor], path: Path, shards: int = 1, order: int = 0) -> Path:
    """A folder with the tensors in a shuffled order, in one file or in several with an index."""
    path.mkdir(parents=True)
    names = sorted(state)
    random.Random(order).shuffle(names)
    if shards == 1:
        save_file({name: state[name] for name in names}, path / "model.safetensors", metadata={"format": "pt"})
        return path
    files = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


def command(folder: Path, out: Path, method: str = "ties") -> list[str]:
    runs = [str(folder / f"run-{number}") for number in range(3)]
    main = "import sys; from emomerge.cli import main; sys.exit(main())"
    return [sys.executable, "-c", main, "merge", str(folder / "base"), *runs, "--method", method, "-o", str(out), "--quiet"]


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def environment(threads: int, seed: int, native: str = "1") -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed), "EMOMERGE_NATIVE": native}


def test_the_same_bytes_however_the_inputs_lie(tmp_path: Path) -> None:
    found = set()
    for variant, (shards, threads, native) in enumerate([(1, 1, "1"), (3, 2, "1"), (2, 1, "0")]):
        folder = tmp_path / str(variant)
        save(tensors(0), folder / "base", shards, variant)
        for number in range(3):
            save(tensors(number + 1), folder / f"run-{number}", shards if number else 1, variant + number)
        subprocess.run(
            command(folder, folder / "out"), check=True, env=environment(threads, variant, native), capture_output=True
        )
        found.add(digest(folder / "out"))
    assert len(found) == 1


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    save(tensors(0), tmp_path / "base")
    runs = [save(tensors(number + 1), tmp_path / f"run-{number}") for number in range(3)]
    write_checkpoint(merge(tmp_path / "base", runs, method="ties"), tmp_path / "whole")
    killer = f"""
import os, signal, sys
from emomerge.checkpoints import stream, writer
stream.CHUNK = 1024
whole = writer._write_tensor
def write_tensor(checkpoint, name, info, *args):
    if info.shape == {SHAPES["head"]!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(checkpoint, name, info, *args)
writer._write_tensor = write_tensor
from emomerge.cli import main
sys.exit(main())
"""
    killed = command(tmp_path, tmp_path / "out")
    killed[2] = killer
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    write_checkpoint(merge(tmp_path / "base", runs, method="ties"), tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run-0", "run-1", "run-2", "whole"]


def test_a_merge_is_repeated_from_any_directory_and_after_a_move(tmp_path, monkeypatch):
    """By `--again`, `--extend` and `reconstruct`; another model of the same name in the way changes nothing."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.manual_seed(0)
    for name in ("base", "one", "two", "three"):
        (work / name).mkdir(parents=True)
        save_file({"a.weight": torch.randn(3, 5)}, work / name / "model.safetensors")
    for name in ("one", "two"):
        save_file({"a.weight": torch.rand(3, 5)}, work / f"fisher-{name}.safetensors")
    (elsewhere / "base").mkdir()
    save_file({"a.weight": torch.zeros(3, 5)}, elsewhere / "base/model.safetensors")

    def call(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    monkeypatch.chdir(work)
    call("merge", "base", "one", "two", "--method", "tall-mask", "--save-masks", "-o", "out/masked")
    files = "information=[fisher-one.safetensors, fisher-two.safetensors]"
    call("merge", "base", "one", "two", "--method", "fisher", "--set", files, "-o", "out/fisher")
    call("merge", "base", "one", "--method", "mean", "-o", "out/mean")
    wanted = {name: (work / "out" / name / "model.safetensors").read_bytes() for name in ("masked", "fisher")}
    assert str(tmp_path) not in (work / "out/masked/merge.json").read_text()
    work.rename(tmp_path / "moved")
    monkeypatch.chdir(elsewhere)
    for name, data in wanted.items():
        call("merge", "--again", tmp_path / "moved/out" / name, "-o", name)
        assert (elsewhere / name / "model.safetensors").read_bytes() == data
        call("merge", "--again", name, "-o", f"{name}-again")
    call("reconstruct", "../moved/out/masked", "one", "-o", "one-again")
    call("merge", "--extend", "../moved/out/mean", "../moved/three", "-o", "two-runs")
