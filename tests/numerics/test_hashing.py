"""Hashes computed in the background equal those of the files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from emomerge.numerics import hashing
from emomerge.numerics.hashing import Digests, sha256


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 12_288])
def test_the_hash_of_a_file_of_any_number_of_windows(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "WINDOW", 4096)
    file = tmp_path / "x"
    file.write_bytes(bytes(i % 251 for i in range(size)))
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha256(file) == Digests([file])(file) == Digests()(file) == expected


def test_an_unreadable_file_fails_when_its_hash_is_requested(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    digest = Digests([tmp_path / "missing", tmp_path / "there"])
    assert digest(tmp_path / "there") == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(FileNotFoundError):
        digest(tmp_path / "missing")
