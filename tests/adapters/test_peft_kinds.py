"""Types of PEFT adapters against their formulas, written out here; bad tensors and settings of each; merges of several."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from emomerge.adapters import bake
from emomerge.adapters.naming import BaseNames
from emomerge.adapters.peft.types import FORMULAS, LIVE, REFUSED, kind_of
from emomerge.checkpoints import MemoryCheckpoint, Piece, open_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput, MissingExtra

OUT, IN = 12, 8
MODULE = "net.layer"


def base() -> MemoryCheckpoint:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{MODULE}.weight": (OUT, IN),
        f"{MODULE}.bias": (OUT,),
        "net.tokens.weight": (OUT, IN),
        "net.kernel.weight": (6, 4, 3, 3),
    }
    return MemoryCheckpoint(
        {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}, source="the base"
    )


def adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], module: str = MODULE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {name if "base_model" in name else f"base_model.model.{module}.{name}": t.clone() for name, t in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    return folder


def skew(packed: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size, dtype=torch.float64)
    values = iter(packed.double())
    for row in range(size):
        for column in range(row + 1, size):
            q[row, column] = next(values)
            q[column, row] = -q[row, column]
    return q


def examples() -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Any]]:
    """Return configuration, tensors, and W′ as a function of W (float64), by type."""
    torch.manual_seed(0)
    r, alpha, eye = 3, 5.0, torch.eye
    w = {name: torch.randn(shape) * 0.3 for name, shape in {
        "w1_a": (OUT, r), "w1_b": (r, IN), "w2_a": (OUT, r), "w2_b": (r, IN), "k1": (3, 2), "k2a": (4, r), "k2b": (r, 4),
        "out": (OUT, 1), "in": (1, IN), "packed": (2, 6), "blocks": (1, 2, 4, 4), "u": (IN, r), "a": (r, IN), "b": (OUT, r),
        "e": (r, 1), "d": (r,), "rows": (OUT,), "block": (r, OUT), "bat": (3, 4, 4), "spectrum": (5,), "A": (r, IN),
        "B": (OUT, r), "R": (r, 1, IN), "S": (OUT, 3, r), "lambda": (r, 3), "gamma": (3, IN), "two": (2, IN),
    }.items()}  # fmt: skip
    d = {name: tensor.double() for name, tensor in w.items()}
    cayley = [(eye(4) - skew(row, 4)) @ torch.linalg.inv(eye(4) + skew(row, 4)) for row in w["packed"]]
    halves = [(block - block.T) / 2 for block in d["blocks"][0]]
    boft = torch.block_diag(*[(eye(4) - half) @ torch.linalg.inv(eye(4) + half) for half in halves])
    chain = eye(IN, dtype=torch.float64)
    for u in d["u"].T:
        chain = chain @ (eye(IN) - 2 * torch.outer(u, u) / (u @ u))
    places = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(9))[:5]
    waves = torch.zeros(OUT * IN, dtype=torch.float64).index_put_((places,), d["spectrum"]).reshape(OUT, IN)
    columns, rows = torch.meshgrid(torch.arange(IN), torch.arange(OUT), indexing="xy")
    angle = 2 * math.pi * (rows[:, :, None, None] * rows / OUT + columns[:, :, None, None] * columns / IN)
    wave = 7.0 * (waves * torch.cos(angle)).sum((2, 3)) / (OUT * IN)
    bat = lambda W: torch.cat([  # noqa: E731
        torch.cat([W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] @ (eye(4) + d["bat"][i]) + d["bat"][i] for j in range(2)], 1)
        for i in range(3)
    ])  # fmt: skip
    tokens = lambda W: torch.stack([d["two"][[1, 4].index(i)] if i in (1, 4) else W[i] for i in range(OUT)])  # noqa: E731
    # PEFT lists the products by rank and base on one side, by base and rank on the other; models are trained that way.
    rand = (
        alpha
        / r
        * sum(
            torch.outer(d["S"][:, i, j], d["lambda"][i, j] * d["R"][i, 0] * d["gamma"][j]) for i in range(3) for j in range(3)
        )
    )
    lycoris = {"r": r, "alpha": alpha}
    hada = {f"hada_{name}": w[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    miss = torch.stack([d["block"][j % r] for j in range(IN)], 1)
    return {
        "LOHA": (lycoris, hada, lambda W: W + alpha / r * (d["w1_a"] @ d["w1_b"]) * (d["w2_a"] @ d["w2_b"])),
        "LOKR": (
            lycoris, {"lokr_w1": w["k1"], "lokr_w2_a": w["k2a"], "lokr_w2_b": w["k2b"]},
            lambda W: W + alpha / r * torch.kron(d["k1"], d["k2a"] @ d["k2b"]),
        ),
        "IA3": ({}, {"ia3_l": w["out"]}, lambda W: d["out"] * W),
        "OFT": (
            {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False}, {"oft_R.weight": w["packed"]},
            lambda W: W @ torch.block_diag(*cayley).T,
        ),
        "BOFT": (
            {"boft_block_size": 4, "boft_n_butterfly_factor": 1}, {"boft_R": w["blocks"], "boft_s": w["out"]},
            lambda W: d["out"] * (W @ boft.T),
        ),
        "HRA": ({"r": r}, {"hra_u": w["u"]}, lambda W: W @ chain),
        "MISS": ({"r": r, "init_weights": True}, {"miss_block": w["block"]}, lambda W: W + miss),
        "BONE": ({"r": 4, "init_weights": "bat"}, {"bone_block": w["bat"]}, bat),
        "FOURIERFT": (
            {"n_frequency": 5, "scaling": 7.0, "random_loc_seed": 9}, {"fourierft_spectrum": w["spectrum"]}, lambda W: W + wave
        ),
        "VERA": (
            {"r": r, "projection_prng_key": 0, "save_projection": True},
            {"vera_lambda_d": w["d"], "vera_lambda_b": w["rows"], "base_model.vera_A": w["A"], "base_model.vera_B": w["B"]},
            lambda W: W + torch.diag(d["rows"]) @ d["B"][:OUT] @ torch.diag(d["d"]) @ d["A"][:, :IN],
        ),
        "RANDLORA": (
            {"r": r, "randlora_alpha": alpha, "projection_prng_key": 0, "save_projection": True},
            {"randlora_lambda": w["lambda"], "randlora_gamma": w["gamma"], "randlora_A": w["R"], "randlora_B": w["S"]},
            lambda W: W + rand,
        ),
        "ADALORA": (
            {"init_r": 6, "lora_alpha": alpha, "r": 8, "rank_pattern": {f"{MODULE}.lora_E": [True, False] * 3}},
            {"lora_A": w["a"], "lora_B": w["b"], "lora_E": w["e"]},
            lambda W: W + alpha / (6 + 1e-5) * d["b"] @ torch.diag(d["e"][:, 0]) @ d["a"],
        ),
        "TRAINABLE_TOKENS": ({"token_indices": [1, 4]}, {"trainable_tokens_delta": w["two"]}, tokens),
        "LN_TUNING": ({}, {"ln_tuning_layers.weight": w["w1_a"] @ w["w1_b"]}, lambda W: (w["w1_a"] @ w["w1_b"]).double()),
    }  # fmt: skip


EXAMPLES = examples()


def example(folder: Path, kind: str, **more: Any) -> Path:
    config, tensors, _ = EXAMPLES[kind]
    return adapter(folder, {"peft_type": kind, **config, **more}, tensors)


def test_every_type_with_a_formula_has_an_example() -> None:
    assert EXAMPLES.keys() == FORMULAS.keys()
    assert not FORMULAS.keys() & LIVE.keys() and not (FORMULAS.keys() | LIVE.keys() | {"LORA"}) & REFUSED.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_formula(kind: str, tmp_path: Path) -> None:
    origin = base()
    baked = bake(origin, example(tmp_path / "adapter", kind))
    name = f"{MODULE}.weight"
    assert name in baked.touched() and "net.tokens.weight" not in baked.touched()
    expected = EXAMPLES[kind][2](origin[name].double())
    torch.testing.assert_close(baked[name].double(), expected, rtol=0, atol=1e-6)
    delta = baked.delta(name, origin)
    assert delta is not None
    torch.testing.assert_close(delta.double(), expected - origin[name].double(), rtol=0, atol=1e-6)
    assert delta.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind_of(kind).conv1d])
def test_a_layer_that_stores_its_transpose(kind: str, tmp_path: Path) -> None:
    """As Conv1D does; with a base of an unknown model and other lengths of its sides, the shape tells."""
    name, origin = f"{MODULE}.weight", base()
    plain = bake(origin, example(tmp_path / "adapter", kind))[name]
    turned = MemoryCheckpoint({**origin, name: origin[name].T.contiguous()}, source="the base")
    for flag in (True, False):
        baked = bake(turned, example(tmp_path / "adapter", kind, fan_in_fan_out=flag))
        if flag or kind != "FOURIERFT":  # the only one whose tensors do not tell
            torch.testing.assert_close(baked[name].T, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in ("TRAINABLE_TOKENS", "LN_TUNING")])
def test_a_layer_that_the_base_stores_in_pieces(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0 to 4 and 5 to 11 of a layer are two tensors on disk; a formula that needs all of W reads both."""
    live, whole = f"{MODULE}.weight", base()
    plain = bake(whole, example(tmp_path / "adapter", kind))[live]
    split = {"upper.weight": (0, 5), "lower.weight": (5, OUT)}
    pieces = [(name, Piece(live, first * IN, (last - first, IN), (IN, 1))) for name, (first, last) in split.items()]
    parts = {name: whole[live][first:last].contiguous() for name, (first, last) in split.items()}
    monkeypatch.setattr(BaseNames, "find", lambda self, name: name if name in self._base else None)
    monkeypatch.setattr(BaseNames, "parts", lambda self, name: pieces if name == live else [])
    monkeypatch.setattr(BaseNames, "shape", lambda self, name: (OUT, IN))
    baked = bake(MemoryCheckpoint(parts, source="the base"), example(tmp_path / "adapter", kind))
    torch.testing.assert_close(torch.cat([baked[name] for name in split]), plain, rtol=0, atol=1e-6)


def test_ia3_scales_the_bias_of_an_output_only(tmp_path: Path) -> None:
    origin, factor = base(), EXAMPLES["IA3"][1]["ia3_l"]
    baked = bake(origin, example(tmp_path / "adapter", "IA3"))
    torch.testing.assert_close(baked[f"{MODULE}.bias"], origin[f"{MODULE}.bias"] * factor[:, 0])
    baked = bake(origin, adapter(tmp_path / "adapter", {"peft_type": "IA3"}, {"ia3_l": factor[:IN].T}))
    assert baked.touched() == (f"{MODULE}.weight",)
    torch.testing.assert_close(baked[f"{MODULE}.weight"], origin[f"{MODULE}.weight"] * factor[:IN, 0])


def test_blocks_of_a_butterfly_mix_distant_columns(tmp_path: Path) -> None:
    """Two levels: columns 0, 1, 4, 5 turn together in the second, as those of the halves with even number."""
    blocks = torch.zeros(2, 2, 4, 4)
    blocks[1, 0, 0, 2] = 1.0  # the first column of half 0 with the first of half 2
    config = {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2}
    origin = base()
    baked = bake(origin, adapter(tmp_path / "adapter", config, {"boft_R": blocks, "boft_s": torch.ones(OUT, 1)}))
    changed = (baked[f"{MODULE}.weight"] - origin[f"{MODULE}.weight"]).abs().amax(0) > 1e-6
    assert changed.nonzero().flatten().tolist() == [0, 4]


def test_a_series_of_few_terms(tmp_path: Path) -> None:
    q = torch.block_diag(*[skew(row, 4) for row in EXAMPLES["OFT"][1]["oft_R.weight"]])
    identity = torch.eye(IN, dtype=torch.float64)
    sums = {1: identity, 2: identity + 2 * q, 3: identity + 2 * q + 2 * q @ q + q @ q @ q}
    sums[6] = sums[3] + q @ q @ q + 2 * q @ q @ q @ q + q @ q @ q @ q @ q
    origin = base()
    for terms, total in sums.items():
        baked = bake(origin, example(tmp_path / "a", "OFT", use_cayley_neumann=True, num_cayley_neumann_terms=terms))
        expected = origin[f"{MODULE}.weight"].double() @ total.T
        torch.testing.assert_close(baked[f"{MODULE}.weight"].double(), expected, rtol=0, atol=1e-6)


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        bake(base(), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in ("TRAINABLE_TOKENS", "LN_TUNING")])
def test_a_missing_tensor_is_named(kind: str, tmp_path: Path) -> None:
    config, tensors, _ = EXAMPLES[kind]
    needed = [name for name in tensors if len(tensors) > 1 and not name.startswith("base_model")]
    for name in needed:
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        message = refusal(adapter(tmp_path / "adapter", {"peft_type": kind, **config}, left))
        assert f"expected {name}" in message and MODULE in message


@pytest.mark.parametrize("kind", EXAMPLES)
def test_wrong_shapes_and_values_are_refused(kind: str, tmp_path: Path) -> None:
    config, tensors, _ = EXAMPLES[kind]
    for name, tensor in tensors.items():
        for damaged in (tensor[:-1], tensor[..., :-1], tensor[None], tensor.flatten()[:1], torch.full_like(tensor, torch.nan)):
            message = refusal(adapter(tmp_path / "adapter", {"peft_type": kind, **config}, tensors | {name: damaged}))
            assert "adapter" in message
        message = refusal(adapter(tmp_path / "adapter", {"peft_type": kind, **config}, tensors | {name: tensor.int()}))
        assert "dtype" in message


@pytest.mark.parametrize("kind", EXAMPLES)
def test_unknown_tensors_and_settings_are_refused(kind: str, tmp_path: Path) -> None:
    config, tensors, _ = EXAMPLES[kind]
    for name in ("hada_w3", "lora_C.weight", "oft_r", "base_layer.unheard_of"):
        message = refusal(adapter(tmp_path / "adapter", {"peft_type": kind, **config}, tensors | {name: torch.ones(2)}))
        assert name.partition(".")[0].removesuffix("base_layer") in message
    assert "something_of_tomorrow" in refusal(example(tmp_path / "adapter", kind, something_of_tomorrow=1))
    for field in kind_of(kind).settings.model_fields.keys() - {"peft_type"}:
        assert f"adapter_config.json, {field}" in refusal(example(tmp_path / "adapter", kind, **{field: {"a": "b"}}))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("LOHA", {"r": 4}, "another rank.*expected 4; found 3"),
        ("LOHA", {"rank_pattern": {"layer": 2}}, "another rank.*expected 2; found 3"),
        ("LOHA", {"alpha": 0}, "alpha"),
        ("LOKR", {"r": 2}, "another rank"),
        ("HRA", {"r": 4}, "another rank"),
        ("BOFT", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor"),
        ("VERA", {"r": 4}, "wrong shape.*vera_lambda_d"),
        ("RANDLORA", {"r": 2**31 - 1}, "wrong shape.*randlora_lambda"),
        ("ADALORA", {"rank_pattern": {f"{MODULE}.lora_E": [True, True]}}, "another rank.*expected 2; found 3"),
        ("FOURIERFT", {"n_frequency": 6}, "wrong shape"),
        ("MISS", {"r": 4}, "wrong shape"),
        ("MISS", {"init_weights": "mini", "mini_r": 4}, "wrong shape"),
        ("OFT", {"block_share": True}, "wrong shape"),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 99]}, r"at \[1, 99\]"),
        ("TRAINABLE_TOKENS", {"token_indices": [1]}, r"at \[1\]"),
        ("IA3", {"feedforward_modules": "(a"}, ""),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = example(tmp_path / "adapter", kind, **changes)
    if message:
        assert re.search(message, refusal(folder))
    else:  # a pattern that no convolution asks for
        bake(base(), folder)


def test_a_reflection_needs_a_direction(tmp_path: Path) -> None:
    directions = EXAMPLES["HRA"][1]["hra_u"].clone()
    directions[:, 1] = 0
    assert "without a direction" in refusal(adapter(tmp_path / "adapter", {"peft_type": "HRA", "r": 3}, {"hra_u": directions}))


def test_old_files_of_oft_are_refused_with_the_setting_that_they_lack(tmp_path: Path) -> None:
    tensors = {"oft_r": torch.zeros(2, 4, 4)}
    message = refusal(adapter(tmp_path / "adapter", {"peft_type": "OFT", "r": 2, "module_dropout": 0.0}, tensors))
    assert "oft_block_size" in message


def test_layers_for_which_a_type_does_not_exist_are_refused(tmp_path: Path) -> None:
    for kind in ("VERA", "RANDLORA", "FOURIERFT", "MISS"):
        config, tensors, _ = EXAMPLES[kind]
        assert "expected 2 dimensions" in refusal(adapter(tmp_path / "a", {"peft_type": kind, **config}, tensors, "net.kernel"))


@pytest.mark.parametrize("kind", REFUSED)
def test_types_without_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {"peft_type": kind}, {"base_model.prompt_embeddings": torch.randn(3, IN)})
    save_file(dict(base()), tmp_path / "base.safetensors")
    for command in (["bake"], ["merge", "--method", "mean"]):
        arguments = [*command, tmp_path / "base.safetensors", folder, "-o", tmp_path / "out"]
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 2 and kind in result.stderr and "use it through PEFT" in result.stderr, result.output
    assert not (tmp_path / "out").exists()
    told = json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json"]).output)
    assert told["peft_type"] == kind and told["cannot be baked"]


@pytest.mark.parametrize("method", ["tall-mask", "ties", "mean"])
def test_adapters_of_several_types_are_merged_as_their_baked_models_are(method: str, tmp_path: Path) -> None:
    save_file(dict(base()), tmp_path / "base.safetensors")
    runs, dense = [], []
    for kind in ("LOKR", "IA3", "OFT", "VERA", "TRAINABLE_TOKENS"):
        runs.append(example(tmp_path / kind, kind))
        dense.append(tmp_path / f"{kind}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in bake(base(), runs[-1]).items()}, dense[-1])
    for name, sources in (("adapters", runs), ("dense", dense)):
        arguments = ["merge", tmp_path / "base.safetensors", *sources, "--method", method, "-o", tmp_path / f"{name}.out"]
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    found, expected = open_checkpoint(tmp_path / "adapters.out"), open_checkpoint(tmp_path / "dense.out")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_a_merge_of_other_types_becomes_a_lora_where_it_has_the_rank(tmp_path: Path) -> None:
    save_file(dict(base()), tmp_path / "base.safetensors")
    runs = [example(tmp_path / kind, kind) for kind in ("VERA", "ADALORA")]
    command = ["merge", tmp_path / "base.safetensors", *runs, "--method", "mean", "--as-lora"]
    result = CliRunner().invoke(main, [str(part) for part in [*command, "6", "-o", tmp_path / "lora"]])
    assert result.exit_code == 0, result.output
    name, origin = f"{MODULE}.weight", base()
    expected = torch.stack([bake(origin, run).delta(name, origin) for run in runs]).mean(0)
    torch.testing.assert_close(bake(origin, tmp_path / "lora").delta(name, origin), expected, rtol=0, atol=1e-5)
    runs.append(example(tmp_path / "IA3", "IA3"))  # which also moves a bias
    command = ["merge", tmp_path / "base.safetensors", *runs, "--method", "mean", "--as-lora", "6", "-o", tmp_path / "none"]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 2 and "fits into no adapter" in result.stderr and not (tmp_path / "none").exists()


def test_strengths_scale_what_an_adapter_changes(tmp_path: Path) -> None:
    """Also of a type whose change depends on the base: W + Σ s(W′ − W)."""
    save_file(dict(base()), tmp_path / "base.safetensors")
    runs = {kind: example(tmp_path / kind, kind) for kind in ("OFT", "LOHA")}
    given = [f"{folder}={strength}" for folder, strength in zip(runs.values(), (0.7, -0.4), strict=True)]
    command = ["bake", str(tmp_path / "base.safetensors"), *given, "-o", str(tmp_path / "out.safetensors")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    name = f"{MODULE}.weight"
    weight = base()[name].double()
    expected = weight + 0.7 * (EXAMPLES["OFT"][2](weight) - weight) - 0.4 * (EXAMPLES["LOHA"][2](weight) - weight)
    torch.testing.assert_close(open_checkpoint(tmp_path / "out.safetensors")[name].double(), expected, rtol=0, atol=1e-6)


def test_inspect_shows_the_type_and_its_settings(tmp_path: Path) -> None:
    told = json.loads(CliRunner().invoke(main, ["inspect", str(example(tmp_path / "a", "LOHA")), "--json"]).output)
    assert (told["kind"], told["peft_type"], told["r"], told["alpha"]) == ("adapter", "LOHA", 3, 5.0)


def test_a_type_that_needs_peft_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(tmp_path / "adapter", {"peft_type": "C3A"}, {"c3a_kernel": torch.ones(2, 2, 4)})
    monkeypatch.setattr("emomerge.extras._fault", lambda module, distribution: distribution)
    with pytest.raises(MissingExtra, match=r"C³A.*peft.*emomerge\[train\]"):
        bake(base(), folder)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"c3a_kernel": torch.ones(2, 2, 4)}, {"block_size": 4}, r"expected \(3, 2, 4\); found \(2, 2, 4\)"),
        ({"c3a_kernel": torch.ones(3, 2, 4), "c3a_more": torch.ones(1)}, {"block_size": 4}, "c3a_more.*no such tensor"),
        ({"c3a_kernel": torch.ones(3, 2, 4)}, {"block_size": 5}, "PEFT refuses this adapter"),
        ({"c3a_kernel": torch.ones(3, 2, 4)}, {"block_size": 4, "something_of_tomorrow": 1}, "something_of_tomorrow"),
        ({"c3a_kernel": torch.ones(3, 2, 4)}, {"block_size": 10**9}, "larger than every tensor.*block_size"),
        ({"c3a_kernel": torch.full((3, 2, 4), torch.inf)}, {"block_size": 4}, "NaN or infinity"),
    ],
)
def test_what_peft_would_not_load_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    assert re.search(message, refusal(adapter(tmp_path / "adapter", {"peft_type": "C3A", **config}, tensors)))


def test_peft_merges_a_module_alone(tmp_path: Path) -> None:
    """C³A with one block: the kernel is the first column of a circulant matrix that is added."""
    pytest.importorskip("peft")
    origin, name = base(), f"{MODULE}.weight"
    kernel = torch.randn(3, 2, 4)
    baked = bake(origin, adapter(tmp_path / "adapter", {"peft_type": "C3A", "block_size": 4}, {"c3a_kernel": kernel}))
    state = torch.random.get_rng_state()
    first = baked[name]
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(first, baked[name])
    delta = first - origin[name]
    for i in range(3):
        for j in range(2):
            block = delta[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            torch.testing.assert_close(block[:, 1:], block.roll((1, 1), (0, 1))[:, 1:], rtol=0, atol=1e-5)
            assert block.abs().max() > 0.01
