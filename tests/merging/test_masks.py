"""Masks beside a merge, and the single runs that come back from them."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.checkpoints.reader import read_header
from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.merging import merge, reference
from emomerge.merging.masks import find_run, mask_files, pack, reconstruct, unpack

SHAPES = {"a.weight": (13, 17), "b.bias": (5,), "c.scale": (), "d.still": (9,), "e.empty": (0, 3), "n": (2,)}
FLOATS = ("a.weight", "b.bias", "c.scale")


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@given(st.integers(0, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_what_is_packed_is_unpacked(n, runs, seed):
    masks = torch.rand(runs, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(masks)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (runs, -(-n // 8)))
    for mask, row in zip(masks, packed, strict=True):
        assert torch.equal(unpack(row, n), mask)
        assert all(bool(row[i // 8] >> (i % 8) & 1) == mask[i] for i in range(n))


@pytest.fixture
def parts(exact_run):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if name != "n"}
    base = MemoryCheckpoint({**tensors, "n": torch.tensor([1, 2])}, source="base")
    shared = {name: torch.randn(SHAPES[name], generator=generator) for name in FLOATS}
    taus = [{name: shared[name] + torch.randn(SHAPES[name], generator=generator) for name in FLOATS} for _ in range(3)]
    runs = [exact_run(base, dict.fromkeys(base) | tau, source=f"runs/{t}") for t, tau in enumerate(taus)]
    return base, runs, taus


@pytest.mark.parametrize("kind", ["mean", "sum", "ties"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_each_run_comes_back_as_its_mask_of_the_reference(parts, kind, weights, tmp_path):
    base, runs, taus = parts
    merged = merge(base, runs, reference=kind, weights=weights, lambda_=0.3, scale=0.7)
    write_checkpoint(merged, tmp_path / "out", beside=mask_files(merged))
    flat = torch.stack([torch.cat([tau[name].flatten() for name in FLOATS]) for tau in taus])
    w = torch.ones(3) if weights is None else torch.tensor([x * 3 / sum(weights) for x in weights])
    trimmed = torch.zeros_like(flat)
    if kind == "ties":  # the density counts the weights that no run moves
        whole = torch.nn.functional.pad(flat, (0, 9))
        trimmed = reference.trim(whole, 0.2)[:, :-9]
    r = {
        "mean": lambda: reference.mean(flat, w),
        "sum": lambda: reference.task_arithmetic(flat, w),
        "ties": lambda: reference.ties(trimmed, reference.elect(trimmed), "sum"),
    }[kind]()
    sizes = [base[name].numel() for name in FLOATS]
    for t in range(3):
        rebuilt = reconstruct(tmp_path / "out", f"runs/{t}", base)
        mask = flat[t].abs() > 0.3 * (r - flat[t]).abs()
        expected = torch.where(mask, r, 0).split(sizes)
        for name, tau in zip(FLOATS, expected, strict=True):
            assert torch.equal(rebuilt[name], base[name] + tau.view(SHAPES[name]))
        assert all(rebuilt[name] is base[name] for name in ("d.still", "e.empty", "n"))
    header = read_header(tmp_path / "out/masks/masks.safetensors")
    assert {name: info.shape for name, info in header.tensors.items()} == {
        "a.weight": (3, 28),
        "b.bias": (3, 1),
        "c.scale": (3, 1),
    }
    assert header.metadata["reference"] == kind
    assert header.metadata["bits"] == "little"
    assert json.loads(header.metadata["runs"]) == ["runs/0", "runs/1", "runs/2"]


def test_a_run_is_known_by_its_name_or_the_end_of_its_path():
    assert find_run("x/a", ["x/a", "y/a", "b"]) == 0
    assert find_run("b", ["x/a", "y/a", "z/b"]) == 2
    for run in ("a", "c"):
        with pytest.raises(BadInput, match=f"no such run in this merge; expected x/a, y/a.*; found {run}"):
            find_run(run, ["x/a", "y/a"])


@pytest.fixture
def models(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, runs, _ = parts
    write_checkpoint(MemoryCheckpoint({n: t.bfloat16() if t.is_floating_point() else t for n, t in base.items()}), "base")
    for name, run in zip(("one", "two", "three"), runs, strict=True):
        write_checkpoint(run, f"{name}.safetensors")
    return ["one.safetensors", "two.safetensors", "three.safetensors"]


def test_the_command_line_goes_there_and_back(models, tmp_path):
    result = call("merge", "base", *models, "--save-masks", "-o", "out")
    assert result.exit_code == 0, result.output
    assert open_checkpoint("out").names() == tuple(SHAPES)
    assert call("merge", "base", *models, "-o", "plain").exit_code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert call("reconstruct", "out", "two.safetensors", "--dtype", "float32", "-o", "back.safetensors").exit_code == 0
    base = open_checkpoint("base")
    taus = torch.stack([load_file(name)["a.weight"] - base["a.weight"].float() for name in models])
    r = taus.sum(0) / 3
    mask = taus[1].abs() > 0.4 * (r - taus[1]).abs()
    assert torch.equal(load_file("back.safetensors")["a.weight"], base["a.weight"].float() + torch.where(mask, r, 0))
    assert call("reconstruct", "out", "two.safetensors", "-o", "folder").exit_code == 0
    assert open_checkpoint("folder").info("a.weight").dtype == torch.bfloat16
    assert (tmp_path / "folder/README.md").exists()


def test_what_is_refused(models, tmp_path):
    def fails(result, *words):
        assert result.exit_code == 2, result.output
        for word in words:
            assert word in result.stderr

    fails(call("merge", "base", *models, "--save-masks", "-o", "out.safetensors"), "--save-masks writes a folder")
    fails(
        call("merge", "base", *models, "--save-masks", "--method", "ties", "-o", "out"),
        "no masks of single runs",
        "expected tall-mask; found ties",
    )
    assert call("merge", "base", *models, "-o", "out").exit_code == 0
    fails(call("reconstruct", "out", "one.safetensors", "-o", "back"), "no masks in this folder", "--save-masks")
    assert call("merge", "base", *models, "--save-masks", "-o", "out", "--force").exit_code == 0
    fails(call("reconstruct", "out", "four", "-o", "back"), "no such run", "one.safetensors, two.safetensors")
    fails(call("reconstruct", "base", "one", "-o", "back"), "no record of a merge")
    tensors = load_file("base/model.safetensors")
    save_file({**tensors, "b.bias": tensors["b.bias"] + 1}, "base/model.safetensors")
    fails(call("reconstruct", "out", "one.safetensors", "-o", "back"), "base, model.safetensors", "has changed")
    assert not os.path.lexists("back")
