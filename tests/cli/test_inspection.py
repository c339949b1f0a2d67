"""What two models differ in, against the formulas written out."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from emomerge.cli import main
from emomerge.cli.inspection import compare, show_comparison


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(result, *words):
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {
        "still": torch.randn(4, generator=generator),
        "small": torch.randn(6, 5, generator=generator),
        "large": torch.randn(1500, 1000, generator=generator),
        "n": torch.tensor([1, 2]),
    }
    save_file(base, "base.safetensors")
    for name in ("a", "b"):
        moved = dict(base)
        for tensor, size in (("small", 0.01), ("large", 0.1)):
            moved[tensor] = base[tensor] + size * torch.randn(base[tensor].shape, generator=generator)
            moved[tensor].view(-1)[:10] = base[tensor].view(-1)[:10]
        save_file(moved, f"{name}.safetensors")
    lora = {"base_model.model.x.lora_A.weight": torch.randn(2, 5), "base_model.model.x.lora_B.weight": torch.randn(6, 2)}
    for name, factor in (("p", 1.0), ("q", -2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        scaled = {key: value * (factor if "_B" in key else 1) for key, value in lora.items()}
        save_file(scaled, f"{name}/adapter_model.safetensors")
    save_file({"x.weight": torch.randn(6, 5), "x.bias": torch.zeros(6)}, "dense.safetensors")
    return tmp_path


def expected(x, y):
    """The figures of two flat float64 vectors."""
    both = (x != 0) & (y != 0)
    return {
        "norm": (y - x).norm().item(),
        "relative": ((y - x).norm() / x.norm()).item(),
        "cosine": (x @ y / x.norm() / y.norm()).item(),
        "sign_agreement": (x.sign() == y.sign())[both].double().mean().item(),
        "density": (x != y).double().mean().item(),
    }


def rows(found):
    return {row["name"]: {key: value for key, value in row.items() if key != "name"} for row in found["changed"]}


def load(name, tensor):
    from safetensors.torch import load_file

    return load_file(f"{name}.safetensors")[tensor].double().flatten()


@pytest.mark.parametrize("base", [None, "base.safetensors"])
def test_every_figure_by_its_formula(models, base):
    found = compare("a.safetensors", "b.safetensors", base=base)
    assert list(rows(found)) == ["large", "small"]
    assert found["equal"] == 2
    origin = {name: load("base", name) if base else 0 for name in ("large", "small")}
    pairs = {name: [(load(run, name) - origin[name]).float().double() for run in ("a", "b")] for name in origin}
    for name, (x, y) in pairs.items():
        figures = expected(x, y)
        tolerance = 1e-5 if base is None else 1e-12  # without a base the difference is taken in float32
        assert rows(found)[name] == pytest.approx(figures, rel=tolerance)
    x, y = (torch.cat([pairs["large"][i], pairs["small"][i]]) for i in (0, 1))
    assert found["all"] == pytest.approx(expected(x, y), rel=1e-5)
    assert found["all"]["density"] == pytest.approx(1 - 20 / (1_500_000 + 30))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_adapters_by_what_they_do_and_by_their_factors(models):
    found = compare("p", "q", base="dense.safetensors")
    assert rows(found).keys() == {"x.weight"}
    assert found["equal"] == 1
    figures = rows(found)["x.weight"]
    assert figures["cosine"] == pytest.approx(-1)
    assert figures["relative"] == pytest.approx(3)
    assert (figures["sign_agreement"], figures["density"]) == (0, 1)
    factors = rows(compare("p", "q"))
    assert list(factors) == ["base_model.model.x.lora_B.weight"]
    against_base = rows(compare("dense.safetensors", "p"))
    assert against_base.keys() == {"x.weight"}
    described = json.loads(call("inspect", "p", "dense.safetensors", "--json").output)
    assert described["kind"] == "adapter"
    assert (described["base"], described["tensors changed"]) == ("dense.safetensors", "1 of 2")


def test_nothing_in_common_and_other_shapes(models):
    save_file({"small": torch.zeros(5, 6), "mine": torch.ones(2)}, "c.safetensors")
    found = compare("a.safetensors", "c.safetensors")
    assert found["shapes"] == {"small": [[6, 5], [5, 6]]}
    assert found["only_there"] == ["mine"]
    assert found["only_here"] == ["large", "n", "still"]
    assert found["all"]["cosine"] is None
    save_file({"still": torch.zeros(4)}, "zero.safetensors")
    figures = rows(compare("zero.safetensors", "a.safetensors"))["still"]
    assert (figures["relative"], figures["cosine"], figures["sign_agreement"]) == (None, None, None)
    added = rows(compare("c.safetensors", "zero.safetensors", base="a.safetensors"))
    assert added == {}
    save_file({"mine": torch.tensor([1.0, -1.0])}, "d.safetensors")
    new = rows(compare("c.safetensors", "d.safetensors", base="a.safetensors"))["mine"]  # which the base lacks
    assert (new["norm"], new["cosine"], new["density"]) == (2, 0, 0.5)


def test_the_table_shows_the_largest_first(models):
    result = call("inspect", "a.safetensors", "b.safetensors")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if any(word in line for word in ("all of", "large", "small"))]
    assert [line.split()[1] for line in lines] == ["all", "large", "small"]
    shortened = call("inspect", "a.safetensors", "b.safetensors", "--top", 1, "--base", "base.safetensors")
    assert "and 1 more" in " ".join(shortened.stdout.split())
    assert "both from base.safetensors" in " ".join(shortened.stdout.split())
    assert show_comparison(compare("a.safetensors", "b.safetensors"), top=0).row_count == 3
    fails(call("inspect", "a.safetensors", "--base", "base.safetensors"), "--base belongs to a comparison")
