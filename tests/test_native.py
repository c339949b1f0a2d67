"""Compiling kernels on machines of many kinds, and what compiled code must not do."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge import native
from emomerge.errors import BadInput
from emomerge.optim import OPTIMIZERS
from emomerge.optim.base import EmoOptimizer

pytestmark = pytest.mark.usefixtures("compiler")


def build(*args):
    """The library, without memory of earlier calls."""
    return native.build.__wrapped__(*args).library


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("EMOMERGE_NATIVE", raising=False)
    probe = tmp_path / "probe.c"
    probe.write_text("int one(void) { return 1; }\n")
    if build(probe) is None:
        pytest.skip("no C compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "room"
    folder.mkdir()
    file = folder / "kernels.c"
    file.write_text("int answer(void) { return ANSWER; }\n")
    return file


def answer(source: Path) -> int | None:
    compiled = build(source, "ANSWER=42")
    return None if compiled is None else compiled.answer()


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "a cache" / "emomerge").glob("room-*.so"))


def test_compiles_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(source) == 42
    (file,) = cached(tmp_path)
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert answer(source) == 42
    assert cached(tmp_path) == [file]


def test_a_changed_header_is_compiled_again(source: Path, tmp_path: Path) -> None:
    header = tmp_path / "shared.h"
    header.write_text("#define MORE 1\n")
    source.write_text('#include "../shared.h"\nint answer(void) { return ANSWER + MORE; }\n')
    assert answer(source) == 43
    header.write_text("#define MORE 2\n")
    assert answer(source) == 44


def test_a_compiler_with_arguments(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -DWITH_ARGUMENTS")
    source.write_text("#ifndef WITH_ARGUMENTS\n#error\n#endif\n" + source.read_text())
    assert answer(source) == 42


def test_a_compiler_that_does_not_know_every_flag(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "simple-cc"
    script.write_text('#!/bin/sh\ncase "$*" in *-march*) exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert answer(source) == 42


@pytest.mark.parametrize("cc", ["false", "true"])
def test_a_compiler_that_does_not_work_causes_a_warning(source: Path, cc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    with pytest.warns(UserWarning, match=rf"{cc} failed on .*kernels\.c"):
        assert answer(source) is None


def test_a_source_with_an_error_is_reported_in_one_line_and_once(source: Path) -> None:
    source.write_text("int answer(void) {")
    native.build.cache_clear()
    with pytest.warns(UserWarning, match="kernels.c.*error") as caught:
        assert native.library(source) is None is native.library(source)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert native.status(source).startswith("torch (")
    native.build.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "reason"), [("CC", "no-such-compiler", "no-such-compiler not found"), ("EMOMERGE_NATIVE", "0", "=0")]
)
@pytest.mark.filterwarnings("error")
def test_the_status_says_which_path_is_used_and_why(
    source: Path, variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.build.cache_clear()
    assert native.status(source, "ANSWER=42").startswith("compiled by /")
    native.build.cache_clear()
    monkeypatch.setenv(variable, value)
    assert native.library(source, "ANSWER=42") is None
    assert reason in native.status(source, "ANSWER=42")
    native.build.cache_clear()


@pytest.mark.filterwarnings("ignore:.*failed on:UserWarning")
def test_a_damaged_cache_is_compiled_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda command, source, built: built.write_bytes(b"half of a lib"))
        assert answer(source) is None
    (file,) = cached(tmp_path)
    assert answer(source) == 42
    assert cached(tmp_path) == [file] and file.stat().st_size > 1000


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer(source) == 42


def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert answer(source) == 42  # XDG_CACHE_HOME needs no home
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert answer(source) == 42


def test_an_empty_cache_variable_is_no_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert answer(source) == 42
    assert not (tmp_path / "emomerge").exists() and (tmp_path / "home" / ".cache" / "emomerge").is_dir()


def test_imports_where_there_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    assert "library" in runpy.run_path(str(native.__file__))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_works_in_a_child_forked_after_threads_were_used() -> None:
    done: list[int] = []
    native.in_parallel(done.append, range(3))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        native.in_parallel(done.append, range(3, 6))
        os._exit(0 if sorted(done) == [0, 1, 2, 3, 4, 5] else 1)
    assert os.waitpid(child, 0)[1] == 0


def take_step(opt: EmoOptimizer, w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    opt.observe(1.0)
    opt.step()


@pytest.mark.parametrize("name", ["sens", "airy", "cats", "tion"])
def test_writes_nothing_beyond_the_state_of_a_smaller_parameter(name: str) -> None:
    w = nn.Parameter(torch.ones(4))
    opt = OPTIMIZERS[name].load()([w])
    take_step(opt, w)
    w.data = torch.ones(6)
    with pytest.raises((BadInput, RuntimeError), match="shape|size"):
        take_step(opt, w)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reads_nothing_beyond_a_smaller_gradient(name: str) -> None:
    w = nn.Parameter(torch.ones(4))
    opt = OPTIMIZERS[name].load()([w])
    w.grad = torch.ones(4)
    w.data = torch.ones(6)
    opt.observe(1.0)
    with pytest.raises((BadInput, RuntimeError), match="shape|size"):
        opt.step()
