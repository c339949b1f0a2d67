"""A merge on another device, and one whose files are written by workers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from emomerge.adapters import bake
from emomerge.checkpoints import MemoryCheckpoint, OnDevice, RoundingLoss, open_checkpoint, write_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.merging import METHODS, MergedCheckpoint, merge
from emomerge.merging.registry import select
from emomerge.merging.shards import ShardWriter
from emomerge.merging.thresholds import Cut


class Engine:
    """Calls at once, with what went through a pickle."""

    def __init__(self) -> None:
        self.submitted = 0
        self.cancelled: list[int] = []

    def submit(self, function: Any, *args: Any) -> Any:
        found = pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(args)))))
        number = self.submitted
        self.submitted += 1
        return SimpleNamespace(result=lambda: found, cancel=lambda: self.cancelled.append(number))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base, two dense runs and an adapter, as paths relative to where one is."""
    for i, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(i)
        tensors = {f"w{number}.weight": torch.randn(40, 20, generator=generator).bfloat16() for number in range(5)}
        write_checkpoint(MemoryCheckpoint({**tensors, "n": torch.arange(3)}), tmp_path / name)
    stems = [f"base_model.model.{module}.lora_" for module in ("w1", "w3")]
    shapes = {"A": (2, 20), "B": (40, 2)}
    factors = {f"{stem}{factor}.weight": torch.randn(shape) for stem in stems for factor, shape in shapes.items()}
    write_checkpoint(MemoryCheckpoint(factors), tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    monkeypatch.chdir(tmp_path)
    return ["base", "one", "two", "adapter"]


def written(merged: MergedCheckpoint, out: str, **options: Any) -> tuple[dict[str, bytes], Any, Any]:
    loss = RoundingLoss(merged.base)
    write_checkpoint(merged, out, max_shard_size=4000, loss=loss, **options)
    files = {file.name: file.read_bytes() for file in Path(out).iterdir()}
    assert len(files) == 4  # three shards and their index
    return files, merged.diagnostics(), loss.figures()


@pytest.mark.parametrize("method", ["mean", "tall-mask", "ties", "model-stock", "dare-ties"])
def test_workers_write_the_bytes_that_one_process_does(method: str, models: list[str]) -> None:
    base, *runs = models[:3]
    here = written(merge(base, runs, method=method), "here")
    merged, seen, engine = merge(base, runs, method=method), [], Engine()
    options = {"shards_by": ShardWriter(merged, engine), "progress": lambda name, _: seen.append(name)}
    assert written(merged, "there", **options) == here
    assert sorted(seen) == list(merged)
    assert (engine.submitted, engine.cancelled) == (3, [])


def test_what_a_held_out_loss_chose_is_not_chosen_again(models: list[str]) -> None:
    asked = []

    def loss(checkpoint: Any) -> float:
        asked.append(checkpoint)
        return float(sum(checkpoint[name].double().square().sum() for name in ("w0.weight", "w3.weight")))

    merged = merge(*models[:1], models[1:3], held_out_loss=loss)
    here, count = {name: merged[name] for name in merged}, len(asked)
    write_checkpoint(merged, "there", dtype="float32", max_shard_size=8000, shards_by=ShardWriter(merged, Engine()))
    assert len(asked) == count
    there = open_checkpoint("there")
    assert all(torch.equal(there[name].to(here[name].dtype), here[name]) for name in here)


def test_what_is_wrong_in_a_worker_is_said_here(models: list[str]) -> None:
    tensors = dict(open_checkpoint("two"))
    tensors["w0.weight"] = tensors["w0.weight"].index_fill(0, torch.tensor([7]), torch.inf)
    merged, engine = merge("base", ["one", MemoryCheckpoint(tensors, source="two")], method="mean"), Engine()
    with pytest.raises(BadInput, match="non-finite task vector: w0.weight of run two"):
        write_checkpoint(merged, "out", max_shard_size=4000, shards_by=ShardWriter(merged, engine))
    assert engine.cancelled == [1, 2]
    assert not Path("out").exists()


@pytest.mark.cluster
def test_ray_writes_the_same_files(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    import ray

    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    common = ["merge", *models, "--method", "ties", "--density", "0.3", "--max-shard-size", "4KB", "--quiet"]
    try:
        for out, more in (("here", []), ("there", ["--executor", "ray"])):
            result = CliRunner().invoke(main, [*common, "-o", out, *more])
            assert result.exit_code == 0, result.output
    finally:
        ray.shutdown()
    here, there = ({f.name: f.read_bytes() for f in Path(out).iterdir() if f.name != "README.md"} for out in ("here", "there"))
    assert len(here) == 5
    assert here == there


# Devices.


def test_a_checkpoint_on_a_device_is_the_same(models: list[str]) -> None:
    base, dense = open_checkpoint("base"), open_checkpoint("one")
    device = torch.device("cpu")
    there = OnDevice(base, device)
    assert there.names() == base.names() and there.folder == base.folder and there.source == base.source
    for run in (dense, bake(base, "adapter")):
        for name in base:
            delta, found = run.delta(name, base), OnDevice(run, device).delta(name, there)
            assert (found is None) == (delta is None)
            assert delta is None or torch.equal(found, delta)
    assert OnDevice(base, torch.device("meta"))["w0.weight"].device.type == "meta"
    assert bake(base, "adapter").delta("w1.weight", base) is not None  # and stays exact on the device:
    assert OnDevice(bake(base, "adapter"), torch.device("meta")).delta("w1.weight", there).device.type == "meta"


@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "tall-mask", "ties"])
def test_methods_keep_to_the_device_of_what_they_are_given(method: str) -> None:
    """Tensors without data: a mixture with one of the CPU is an error."""
    deltas = torch.empty(3, 48, device="meta")
    given = {
        "deltas": deltas, "weights": torch.empty(3, device="meta"), "offset": 0, "cut": Cut(torch.empty(3, 1, device="meta")),
        "lambdas": (0.4,) * 3, "votes": 2, "survey": {}, "elect": "sum", "aggregate": "mean", "majority": 1,
    }  # fmt: skip
    function = METHODS[method].function
    found = function(**select(function, given))
    tau = found[0] if isinstance(found, tuple) else found
    assert tau.device.type == "meta" and tau.shape == (48,)


def test_a_device_that_is_not_there(models: list[str]) -> None:
    result = CliRunner().invoke(main, ["merge", *models, "-o", "out", "--device", "nonsense"])
    assert result.exit_code == 2 and "no such device" in result.stderr
    assert CliRunner().invoke(main, ["merge", *models, "-o", "out", "--device", "cpu", "--quiet"]).exit_code == 0
