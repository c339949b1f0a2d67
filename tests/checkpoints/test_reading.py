"""A checkpoint that cannot be opened is refused in one line that says what is wrong and where."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput, MissingExtra


def refusal(source: object, **options: object) -> str:
    with pytest.raises(BadInput) as caught:
        open_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(MemoryCheckpoint({name: torch.randn(4) for name in "abc"}), tmp_path / "s", max_shard_size=20)
    return tmp_path / "s"


def edit_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_checkpoint_is_a_sorted_lazy_mapping(tmp_path, sharded):
    checkpoint = open_checkpoint(str(sharded))
    assert list(checkpoint) == ["a", "b", "c"] == list(checkpoint.names())
    assert "a" in checkpoint
    assert "z" not in checkpoint
    assert 3 not in checkpoint
    assert len(checkpoint) == 3
    assert checkpoint.folder == sharded
    assert checkpoint.source == str(sharded)
    with pytest.raises(KeyError):
        checkpoint["z"]


def test_a_folder_may_hold_one_file_of_any_name(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert open_checkpoint(tmp_path).names() == ("a",)
    save_file({"b": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "several" in refusal(tmp_path)
    save_file({"c": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names() == ("c",)


def test_missing_and_empty(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.safetensors")
    assert "no such checkpoint" in refusal("./none/of/these")
    assert "no weights" in refusal(tmp_path)


def test_an_unavailable_hub_id_is_named_with_a_fix():
    message = refusal("nobody-at-all/nothing-here", revision="v9")
    assert "nobody-at-all/nothing-here, revision v9" in message
    assert "HF_HUB_OFFLINE" in message


def test_truncated_files(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in (len(data) - 1, len(data) // 2, 30):
        (tmp_path / "model.safetensors").write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(data + b"more")
    assert "longer than its header" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "not a safetensors file" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0]}}',
        b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_malformed_headers(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert str(path) in refusal(path)


def test_text_is_not_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"x" * 40)
    assert "pickle" in refusal(tmp_path / name)
    assert "save_file" in refusal(tmp_path)


def test_pickles_are_refused_by_content(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    assert "pickle" in refusal(path)
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert "pickle" in refusal(path)
    path.write_bytes(pickle.dumps({"a": list(range(100))}))
    assert "pickle" in refusal(path)


def test_a_header_whose_length_begins_as_a_pickle_does_is_still_read(tmp_path):
    """0x80 0x02…0x05 are also lengths of headers: 640, 896, 1152, 1408 bytes."""
    for length in (0x280, 0x380, 0x480, 0x580):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
        assert open_checkpoint(path)["a"].item() == 0


def test_an_index_that_is_not_json(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    assert "not an index" in refusal(sharded)
    edit_index(sharded, [1])
    assert "not an index" in refusal(sharded)


def test_an_index_with_missing_files_or_tensors(sharded):
    edit_index(sharded, {"a": "model-00009.safetensors"})
    assert "model-00009.safetensors" in refusal(sharded)
    edit_index(sharded, {"zz": "model-00001-of-00003.safetensors"})
    assert "zz" in refusal(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE", "link", ""])
def test_an_index_cannot_point_outside_its_folder(name, sharded):
    outside = sharded.parent / "outside.safetensors"
    save_file({"a": torch.zeros(2)}, outside)
    (sharded / "link").symlink_to(outside)
    edit_index(sharded, {"a": str(outside) if name == "ABSOLUTE" else name})
    assert "leads out of its folder" in refusal(sharded)


def test_the_links_of_the_hub_cache_are_followed(sharded):
    cache = sharded.parent / "models--x"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert open_checkpoint(snapshot).names() == ("a", "b", "c")


def test_a_hub_id_without_huggingface_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"org/model is not a local path.*huggingface_hub.*emomerge\[train\]"):
        open_checkpoint("org/model")
