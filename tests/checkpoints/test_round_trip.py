"""Written checkpoints are read back unchanged, for every dtype, shape and shard size."""

from __future__ import annotations

import hashlib
import json
import string
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import (
    Checkpoint,
    MemoryCheckpoint,
    SideFile,
    TensorInfo,
    open_checkpoint,
    sha256,
    write_checkpoint,
)
from emomerge.checkpoints.reader import DTYPES, read_header
from emomerge.errors import BadInput
from emomerge.numerics.rounding import round_to


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype == torch.float8_e8m0fnu:
        return torch.full(shape, 2.0).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def assert_same(left, right) -> None:
    assert tuple(left) == tuple(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert raw(left[name]) == raw(right[name])


names = st.text(string.ascii_letters + '._0123é"\\', min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
states = st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 99)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(states, st.integers(1, 2000))
def test_folders_round_trip(state, max_shard_size):
    tensors = MemoryCheckpoint({name: tensor_of(*spec) for name, spec in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        hashes = write_checkpoint(tensors, out, max_shard_size=max_shard_size)
        read = open_checkpoint(out)
        assert_same(tensors, read)
        for name in read:
            assert read.info(name) == tensors.info(name)
        for file, digest in hashes.items():
            assert sha256(out / file) == digest == hashlib.sha256((out / file).read_bytes()).hexdigest()
            sizes = [info.nbytes for info in map(open_checkpoint(out / file).info, open_checkpoint(out / file))]
            assert sum(sizes) <= max_shard_size or sum(size > 0 for size in sizes) == 1


@settings(max_examples=30, deadline=None)
@given(states)
def test_single_files_are_read_by_safetensors_itself(state):
    tensors = MemoryCheckpoint({name: tensor_of(*spec) for name, spec in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.safetensors"
        write_checkpoint(tensors, out)
        assert_same({name: load_file(out)[name] for name in tensors}, tensors)


def test_bytes_are_those_of_safetensors_itself(tmp_path):
    tensors = {f"layer.{i}": torch.randn(3, i + 1) for i in range(12)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_bytes_do_not_depend_on_order_or_repetition(tmp_path):
    tensors = {name: torch.full((5,), float(ord(name))) for name in "dbac"}
    first = write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "one", max_shard_size=40)
    second = write_checkpoint(MemoryCheckpoint(dict(sorted(tensors.items()))), tmp_path / "two", max_shard_size=40)
    assert first == second
    assert len(first) == 2
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_views_and_strides_are_written_by_their_values(tmp_path):
    square = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": square.T, "row": square[1], "step": square[:, ::2], "one": square[0, 0]}
    write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "x.safetensors")
    assert_same(MemoryCheckpoint(tensors), open_checkpoint(tmp_path / "x.safetensors"))


def test_the_index_is_that_of_transformers(tmp_path):
    write_checkpoint(MemoryCheckpoint({name: torch.zeros(10) for name in "abc"}), tmp_path / "out", max_shard_size="80")
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_parameters": 30, "total_size": 120},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }


class Wider(Checkpoint):
    """Stored as bf16, worked on in fp32, as merged weights are; counts how many tensors live at once."""

    source = "wider"

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values_ = values

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values_))

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(torch.bfloat16, tuple(self.values_[name].shape))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values_[name]


def test_a_wider_working_dtype_is_rounded_once(tmp_path):
    values = torch.randn(1000)
    write_checkpoint(Wider({"w": values}), tmp_path / "base.safetensors")
    write_checkpoint(Wider({"w": values}), tmp_path / "full.safetensors", dtype="float32")
    write_checkpoint(Wider({"w": values}), tmp_path / "half.safetensors", dtype="float16")
    assert torch.equal(open_checkpoint(tmp_path / "base.safetensors")["w"], values.bfloat16())
    assert torch.equal(open_checkpoint(tmp_path / "full.safetensors")["w"], values)
    assert torch.equal(open_checkpoint(tmp_path / "half.safetensors")["w"], values.half())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), max_size=20), st.sampled_from([torch.bfloat16, torch.float16]))
def test_float64_is_rounded_once_not_through_float32(values, dtype):
    values += [1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40, -1 - 2**-11 - 2**-40]  # just above ties that fp32 would see
    exact = torch.tensor(values, dtype=torch.float64)
    rounded = round_to(exact, dtype)
    for bound in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(rounded, torch.full_like(rounded, bound)).double()
        assert ((rounded.double() - exact).abs() <= (neighbour - exact).abs()).all()


def test_dtype_changes_floats_only(tmp_path):
    tensors = {"w": torch.randn(3), "n": torch.arange(3), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "x.safetensors", dtype="bfloat16")
    read = open_checkpoint(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "w": torch.bfloat16,
        "n": torch.int64,
        "f8": torch.bfloat16,
    }


def test_one_tensor_at_a_time(tmp_path):
    """The writer keeps no tensor that it has written."""
    import gc
    import weakref

    alive: list[weakref.ref] = []

    class Fresh(Wider):
        def __getitem__(self, name):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = super().__getitem__(name).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    write_checkpoint(Fresh({str(i): torch.randn(50) for i in range(8)}), tmp_path / "out", max_shard_size=300)
    assert len(alive) == 8


def test_progress_and_extra_files_are_called_in_order(tmp_path):
    seen: list[tuple[str, int]] = []
    write_checkpoint(
        MemoryCheckpoint({"a": torch.zeros(4), "b": torch.zeros(2)}),
        tmp_path / "out",
        progress=lambda name, nbytes: seen.append((name, nbytes)),
        extra_files=lambda: {"README.md": f"{len(seen)} tensors ü\n"},
    )
    assert seen == [("a", 16), ("b", 8)]
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "2 tensors ü\n"


def test_config_and_tokenizer_are_copied_and_nothing_else(tmp_path):
    wanted = {"config.json", "tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"}
    unwanted = {
        "model.safetensors.index.json",
        "adapter_config.json",
        "pytorch_model.bin.index.json",
        "README.md",
        "code.py",
        "pytorch_model.bin",
        "model.safetensors",
        ".hidden.json",
        "training_args.bin",
    }
    source = tmp_path / "source"
    source.mkdir()
    for name in wanted | unwanted:
        (source / name).write_text("{}")
    write_checkpoint(MemoryCheckpoint({"a": torch.zeros(1)}), tmp_path / "out", files_from=source)
    assert {path.name for path in (tmp_path / "out").iterdir()} == wanted | {"model.safetensors"}


@pytest.mark.parametrize("size", ["5 apples", "-1", "0", 0, "", "1.5.2GB"])
def test_malformed_sizes_are_refused(size, tmp_path):
    with pytest.raises(BadInput, match="not a size"):
        write_checkpoint(MemoryCheckpoint({}), tmp_path / "out", max_shard_size=size)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(BadInput, match="dtype"):
        write_checkpoint(MemoryCheckpoint({"a": torch.zeros(1)}), tmp_path / "out", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_side_files_are_written_beside_the_weights(tmp_path):
    weights = MemoryCheckpoint({"w": torch.zeros(3)})
    side = SideFile(MemoryCheckpoint({"m": torch.arange(4, dtype=torch.uint8)}), {"kind": "é"})
    hashes = write_checkpoint(weights, tmp_path / "out", dtype="bfloat16", beside={"more/side.safetensors": side})
    assert hashes["more/side.safetensors"] == sha256(tmp_path / "out/more/side.safetensors")
    header = read_header(tmp_path / "out/more/side.safetensors")
    assert header.metadata == {"format": "pt", "kind": "é"}
    assert torch.equal(load_file(tmp_path / "out/more/side.safetensors")["m"], side.tensors["m"])
    assert open_checkpoint(tmp_path / "out").names() == ("w",)
    with pytest.raises(BadInput, match="NaN"):
        broken = SideFile(MemoryCheckpoint({"m": torch.tensor(float("nan"))}), {})
        write_checkpoint(weights, tmp_path / "other", beside={"side.safetensors": broken})
    assert not (tmp_path / "other").exists()


def test_a_name_that_is_too_long_is_no_checkpoint():
    with pytest.raises(BadInput, match="no such checkpoint"):
        open_checkpoint("x" * 5000)
