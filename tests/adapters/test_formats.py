"""The table of formats, and adapter files that none of them reads."""

from __future__ import annotations

from pathlib import Path

from emomerge.adapters.formats import weight_files


def test_which_files_a_folder_most_likely_means(tmp_path: Path) -> None:
    assert weight_files(str(tmp_path / "nothing")) == []
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file in (*shards, tmp_path / "other.safetensors"):
        file.write_text("")
    assert weight_files(str(tmp_path)) == shards
    (tmp_path / "model.safetensors").write_text("")
    assert weight_files(str(tmp_path)) == [tmp_path / "model.safetensors"]
    assert weight_files(str(shards[0])) == [shards[0]]
