"""The arithmetic of adapter modules against sums written out in float64, with distinct dimensions, α ≠ r and s ≠ 1."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emomerge.adapters.formulas import Formula, ModuleChange, module_of, split_key

OUT, IN, RANK, ALPHA, STRENGTH = 12, 10, 3, 5.0, 0.7
LINEAR, CONV, CONV1 = (OUT, IN), (OUT, IN, 3, 5), (OUT, IN, 1, 1)
TOLERANCE = 1e-6


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def alpha(value: float = ALPHA) -> dict[str, Tensor]:
    return {"alpha": torch.tensor(value)}


def weight_of(module: ModuleChange, shape: tuple[int, ...]) -> Formula:
    formula = module.parameters["weight"]
    formula.check(shape, where="test")
    return formula


def assert_change(module: ModuleChange, weight: Tensor, changed: Tensor) -> None:
    """Compare W + s(W′ − W) at several strengths with W′ in float64."""
    formula = weight_of(module, tuple(weight.shape))
    before = weight.clone()
    for strength in (1.0, STRENGTH, 0.0, -1.5):
        wanted = weight.double() + strength * (changed - weight.double())
        found = formula.apply(weight, strength)
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
    assert torch.equal(weight, before)
    if formula.additive:
        delta = formula.delta(tuple(weight.shape), torch.float64)
        assert (delta - (changed - weight.double())).abs().max() <= TOLERANCE
    wide = formula.apply(weight.double(), STRENGTH)
    assert wide.dtype == torch.float64
    assert (wide - (weight + STRENGTH * (changed - weight))).abs().max() <= 1e-12 * max(1.0, float(wide.abs().max()))


def lora(kernel: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    return {"lora_up": rand(OUT, RANK, *ones), "lora_down": rand(RANK, IN, *kernel), **alpha()}


def lora_delta(tensors: dict[str, Tensor]) -> Tensor:
    up, down = tensors["lora_up"].double().flatten(1), tensors["lora_down"].double()
    rows = [sum(up[o, r] * down[r] for r in range(len(down))) for o in range(len(up))]
    return torch.stack(rows) * (ALPHA / len(down))


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 5), (7,), (2, 3, 2)])
def test_lora(kernel):
    tensors, weight = lora(kernel), rand(OUT, IN, *kernel)
    module = module_of(tensors, where="test")
    assert (module.kind, module.rank, module.alpha) == ("LoRA", RANK, ALPHA)
    assert_change(module, weight, weight.double() + lora_delta(tensors))


def test_lora_without_alpha_has_scale_one():
    tensors, weight = lora(), rand(*LINEAR)
    del tensors["alpha"]
    changed = weight.double() + tensors["lora_up"].double() @ tensors["lora_down"].double()
    module = module_of(tensors, where="test")
    assert module.alpha is None
    assert_change(module, weight, changed)


@pytest.mark.parametrize(("kernel", "shape"), [((), CONV1), ((1, 1), LINEAR)])
def test_lora_of_a_linear_layer_fits_a_1x1_convolution_and_the_other_way_round(kernel, shape):
    tensors, weight = lora(kernel), rand(*shape)
    assert_change(module_of(tensors, where="test"), weight, weight.double() + lora_delta(tensors).reshape(shape))


def test_lora_with_a_core():
    outer = RANK + 1
    tensors = {
        "lora_up": rand(OUT, outer, 1, 1),
        "lora_mid": rand(outer, RANK, 3, 5),
        "lora_down": rand(RANK, IN, 1, 1),
        **alpha(),
    }
    weight, delta = rand(*CONV), torch.zeros(CONV, dtype=torch.float64)
    for m, r in itertools.product(range(outer), range(RANK)):
        ends = torch.outer(tensors["lora_up"][:, m].double().flatten(), tensors["lora_down"][r].double().flatten())
        delta += ends[:, :, None, None] * tensors["lora_mid"][m, r]
    assert_change(module_of(tensors, where="test"), weight, weight.double() + delta * ALPHA / RANK)


@pytest.mark.parametrize("kernel", [(), (3, 5)])
def test_factors_multiply_to_the_change(kernel):
    formula = weight_of(module_of(lora(kernel), where="test"), (OUT, IN, *kernel))
    a, b = formula.factors(torch.float64)
    assert len(a) == RANK
    torch.testing.assert_close((b @ a).reshape(OUT, IN, *kernel), formula.delta((OUT, IN, *kernel), torch.float64))


def test_a_trained_bias_is_scaled_and_a_bias_difference_is_not():
    bias = rand(OUT)
    for suffix, scale in (("lora_up.bias", ALPHA / RANK), ("diff_b", 1.0)):
        change = rand(OUT)
        module = module_of({**lora(), suffix: change}, where="test")
        torch.testing.assert_close(module.parameters["bias"].apply(bias, STRENGTH), bias + STRENGTH * scale * change)


def normalised(moved: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    slices = [magnitude[i] * part / part.norm() for i, part in enumerate(moved.unbind(axis))]
    return torch.stack(slices, axis)


@pytest.mark.parametrize("kernel", [(), (3, 5)])
@pytest.mark.parametrize(
    ("suffix", "shape", "axis"),
    [
        ("dora_scale", (OUT, 1), 0), ("dora_scale", (1, IN), 1), ("dora_scale", (OUT,), 0),
        ("magnitude", (OUT,), 0), ("magnitude", (1, OUT), 0),
    ],
)  # fmt: skip
def test_dora(kernel, suffix, shape, axis):
    if len(shape) == 2:
        shape = (*shape, *(1 for _ in kernel))
    tensors, weight = lora(kernel), rand(OUT, IN, *kernel)
    tensors[suffix] = torch.rand(shape) + 0.5
    changed = normalised(weight.double() + lora_delta(tensors), tensors[suffix].double().flatten(), axis)
    module = module_of(tensors, where="test")
    assert module.kind == "LoRA + DoRA"
    assert_change(module, weight, changed)


def test_dora_of_a_linear_layer_on_a_1x1_convolution():
    tensors = lora() | {"dora_scale": torch.rand(1, IN) + 0.5}
    linear, formula = rand(*LINEAR), weight_of(module_of(tensors, where="test"), CONV1)
    torch.testing.assert_close(formula.apply(linear.reshape(CONV1), STRENGTH).flatten(1), formula.apply(linear, STRENGTH))


def test_dora_keeps_rows_of_zeros():
    tensors = lora() | {"dora_scale": torch.ones(OUT, 1)}
    tensors["lora_up"][4] = 0
    weight = rand(*LINEAR)
    weight[4] = 0
    assert module_of(tensors, where="test").parameters["weight"].apply(weight)[4].eq(0).all()


def test_loha():
    tensors = (
        {f"hada_w{n}_a": rand(OUT, RANK) for n in (1, 2)} | {f"hada_w{n}_b": rand(RANK, IN * 15) for n in (1, 2)} | alpha()
    )
    weight = rand(*CONV)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    delta = torch.zeros(OUT, IN * 15, dtype=torch.float64)
    for r, q in itertools.product(range(RANK), repeat=2):
        delta += torch.outer(wide["hada_w1_a"][:, r] * wide["hada_w2_a"][:, q], wide["hada_w1_b"][r] * wide["hada_w2_b"][q])
    module = module_of(tensors, where="test")
    assert (module.kind, module.rank) == ("LoHa", RANK)
    assert_change(module, weight, weight.double() + (delta * ALPHA / RANK).reshape(CONV))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return Σ core[i, j]·a[i, row]·b[j, column], term by term."""
    total = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for i, j in itertools.product(range(core.shape[0]), range(core.shape[1])):
        total += torch.outer(a[i].double(), b[j].double())[:, :, None, None] * core[i, j]
    return total


def test_loha_with_cores():
    tensors = alpha()
    for n in (1, 2):
        tensors |= {f"hada_t{n}": rand(RANK, RANK, 3, 5), f"hada_w{n}_a": rand(RANK, OUT), f"hada_w{n}_b": rand(RANK, IN)}
    first, second = (tucker(*(tensors[f"hada_{part}"] for part in (f"t{n}", f"w{n}_a", f"w{n}_b"))) for n in (1, 2))
    weight = rand(*CONV)
    assert_change(module_of(tensors, where="test"), weight, weight.double() + first * second * ALPHA / RANK)


def blocks(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([torch.cat([x * second for x in row], 1) for row in first])


@pytest.mark.parametrize("kernel", [(), (3, 5)])
@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("second", ["whole", "product", "core"])
def test_lokr(kernel, first, second):
    if second == "core" and not kernel:
        kernel = (2, 2)
    tensors = alpha(1.25)
    if first == "whole":
        tensors["lokr_w1"] = rand(3, 2)
        one = tensors["lokr_w1"].double()
    else:
        tensors |= {"lokr_w1_a": rand(3, RANK), "lokr_w1_b": rand(RANK, 2)}
        one = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    if second == "whole":
        tensors["lokr_w2"] = rand(4, 5, *kernel)
        two = tensors["lokr_w2"].double()
    elif second == "product":
        tensors |= {"lokr_w2_a": rand(4, RANK), "lokr_w2_b": rand(RANK, 5 * (15 if kernel else 1))}
        two = (tensors["lokr_w2_a"].double() @ tensors["lokr_w2_b"].double()).reshape(4, 5, *kernel)
    else:
        tensors |= {"lokr_t2": rand(RANK, RANK, *kernel), "lokr_w2_a": rand(RANK, 4), "lokr_w2_b": rand(RANK, 5)}
        two = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    scale = 1.0 if (first, second) == ("whole", "whole") else 1.25 / RANK
    weight = rand(OUT, IN, *kernel)
    assert_change(module_of(tensors, where="test"), weight, weight.double() + scale * blocks(one, two))


@pytest.mark.parametrize("stored", [9999999999.0, float("inf")])
def test_whole_lokr_ignores_alpha(stored):
    """ai-toolkit stores 9999999999 for full rank, which float16 turns into infinity."""
    tensors = {"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 5)}
    weight = rand(*LINEAR)
    module = module_of(tensors | {"alpha": torch.tensor(stored)}, where="test")
    assert module.alpha is None
    assert_change(module, weight, weight.double() + blocks(tensors["lokr_w1"].double(), tensors["lokr_w2"].double()))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_glora(shape, old):
    kernel = shape[2:]
    a1, a2, b1, b2 = rand(IN, RANK), rand(RANK, IN), rand(OUT, RANK), rand(RANK, IN, *kernel)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    tensors = dict(zip(names, (a1, a2, b1, b2), strict=True)) | alpha()
    weight = rand(*shape)
    wide = weight.double()
    through = torch.stack([sum(wide[:, i] * (a1.double() @ a2.double())[i, j] for i in range(IN)) for j in range(IN)], 1)
    product = (b1.double() @ b2.double().flatten(1)).reshape(shape)
    assert_change(module_of(tensors, where="test"), weight, wide + ALPHA / RANK * (product + through))


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3(shape, on_input):
    factor = rand(shape[on_input])
    stored = factor if len(shape) == 2 else factor.reshape(1, -1, 1, 1)
    weight = rand(*shape)
    parts = [part * (1 + factor[i].double()) for i, part in enumerate(weight.double().unbind(on_input))]
    module = module_of({"weight": stored, "on_input": torch.tensor(on_input)}, where="test")
    assert_change(module, weight, torch.stack(parts, on_input))


def cayley(block: Tensor, limit: float, norm: float) -> Tensor:
    skew = block - block.T
    if limit and norm > limit:
        skew = skew * limit / norm
    identity = torch.eye(len(block), dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


@pytest.mark.parametrize("constraint", [None, 0.0, 0.01])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_oft(shape, constraint, rescale):
    stored = rand(3, 4, 4)
    tensors = {"oft_blocks": stored}
    if constraint is not None:
        tensors |= alpha(constraint)
        constraint = float(tensors["alpha"])
    factor = torch.rand(OUT, *(1 for _ in shape[1:])) + 0.5 if rescale else torch.ones(())
    if rescale:
        tensors["rescale"] = factor
    norm = float((stored.double() - stored.double().mT).norm())
    rotation = torch.block_diag(*(cayley(block, (constraint or 0) * OUT, norm) for block in stored.double()))
    weight = rand(*shape)
    turned = (rotation.T @ weight.double().flatten(1)).reshape(shape) * factor.double()
    assert_change(module_of(tensors, where="test"), weight, turned)


def test_oft_keeps_singular_values_without_rescale():
    weight = rand(*LINEAR)
    turned = module_of({"oft_blocks": rand(3, 4, 4) * 3}, where="test").parameters["weight"].apply(weight)
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(weight))


def test_oft_of_fused_layers_turns_each_part_under_its_own_constraint():
    parts = [rand(3, 4, 4), rand(2, 3, 3)]
    fused = module_of({f"oft_blocks.{n}": part for n, part in enumerate(parts)} | alpha(0.01), where="test")
    weight = rand(18, IN)
    alone = [
        module_of({"oft_blocks": part} | alpha(0.01), where="test").parameters["weight"].apply(rows)
        for part, rows in zip(parts, weight.split([12, 6]), strict=True)
    ]
    torch.testing.assert_close(weight_of(fused, (18, IN)).apply(weight), torch.cat(alone))


@pytest.mark.parametrize("constraint", [0.0, 0.002])
def test_boft(constraint):
    stored = rand(3, 4, 4, 4)  # three levels of four blocks of four: 16 rows
    factor, weight = torch.rand(16, 1) + 0.5, rand(16, IN)
    norm = float((stored.double() - stored.double().mT).norm())
    turned = weight.double()
    for level in range(3):
        distance = 2 * 2**level
        order = [
            base + 2 * distance * group + distance * side
            for group in range(16 // (2 * distance)) for base in range(distance) for side in range(2)
        ]  # fmt: skip
        factors = torch.block_diag(
            *(cayley(block, float(torch.tensor(constraint)) * 16, norm) for block in stored[level].double())
        )
        mixed = torch.empty_like(turned)
        mixed[order] = factors @ turned[order]
        turned = mixed
    module = module_of({"oft_blocks": stored, "rescale": factor} | alpha(constraint), where="test")
    assert_change(module, weight, turned * factor.double())


def test_differences_and_replacements():
    value, bias, weight = rand(*CONV), rand(OUT), rand(*CONV)
    module = module_of({"diff": value, "diff_b": bias}, where="test")
    assert module.kind == "difference"
    assert_change(module, weight, weight.double() + value.double())
    assert module.parameters["bias"].delta((OUT,), torch.float32).equal(bias)
    norm = module_of({"w_norm": bias, "b_norm": bias}, where="test")
    assert (norm.kind, set(norm.parameters)) == ("norm", {"weight", "bias"})
    gain = rand(OUT)
    assert_change(norm, gain, gain.double() + bias.double())
    assert_change(module_of({"set_weight": value}, where="test"), weight, value.double())
    modulation = module_of({"diff_m": rand(1, 6, OUT)}, where="test")
    assert set(modulation.parameters) == {"modulation"}


def all_formulas() -> dict[str, tuple[Formula, tuple[int, ...]]]:
    """Return one formula of each kind, and a shape that it fits."""
    kinds = {
        "LoRA": lora(), "DoRA": lora() | {"dora_scale": torch.rand(OUT, 1) + 0.5},
        "LoHa": {f"hada_w{n}_{side}": rand(*size) for n in (1, 2) for side, size in (("a", (OUT, RANK)), ("b", (RANK, IN)))},
        "LoKr": {"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 5)},
        "GLoRA": {"a1": rand(IN, RANK), "a2": rand(RANK, IN), "b1": rand(OUT, RANK), "b2": rand(RANK, IN)},
        "IA3": {"weight": rand(OUT), "on_input": torch.tensor(0)},
        "IA3 input": {"weight": rand(IN), "on_input": torch.tensor(1)},
        "diff": {"diff": rand(*LINEAR)}, "set_weight": {"set_weight": rand(*LINEAR)},
        "OFT": {"oft_blocks": rand(3, 4, 4)}, "DoRA input": lora() | {"dora_scale": torch.rand(1, IN) + 0.5},
    }  # fmt: skip
    return {name: (module_of(tensors, where=name).parameters["weight"], LINEAR) for name, tensors in kinds.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_some_rows_of_a_formula_are_the_rows_of_its_result(data):
    name = data.draw(st.sampled_from(sorted(all_formulas())))
    formula, shape = all_formulas()[name]
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, OUT - 1))
        index = slice(start, data.draw(st.integers(start + 1, OUT)))
    else:
        index = torch.tensor(data.draw(st.permutations(range(OUT))))
    weight, taken = rand(*shape), formula.take(index)
    if taken is None:
        assert name in ("OFT", "DoRA input")
        return
    rows = weight[index]
    taken.check(tuple(rows.shape), where="test")
    assert taken.rows in (len(rows), None)
    torch.testing.assert_close(taken.apply(rows, STRENGTH), formula.apply(weight, STRENGTH)[index], atol=1e-6, rtol=1e-6)
    if formula.additive:
        torch.testing.assert_close(taken.delta(tuple(rows.shape), torch.float32), formula.delta(shape, torch.float32)[index])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["LoRA", "DoRA", "LoHa", "LoKr", "GLoRA", "IA3", "OFT"]), st.floats(-3, 3), st.floats(-3, 3))
def test_strength_is_linear(name, s, t):
    formula, shape = all_formulas()[name]
    weight = rand(*shape).double()
    mean = formula.apply(weight, (s + t) / 2)
    torch.testing.assert_close(mean, (formula.apply(weight, s) + formula.apply(weight, t)) / 2, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_widened_before_any_arithmetic(dtype):
    narrow = {name: tensor.to(dtype) for name, tensor in lora().items()}
    weight = rand(*LINEAR).to(dtype)
    wide = module_of({name: tensor.double() for name, tensor in narrow.items()}, where="test").parameters["weight"]
    found = module_of(narrow, where="test").parameters["weight"].apply(weight, STRENGTH)
    assert found.dtype == torch.float32
    assert (found - wide.apply(weight.double(), STRENGTH)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", sorted(all_formulas()))
def test_bits_do_not_depend_on_the_number_of_threads(name):
    formula, shape = all_formulas()[name]
    weight = rand(*shape)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(formula.apply(weight, STRENGTH))
        assert torch.get_num_threads() == threads
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("key", "module", "suffix"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0", "lora_up"),
        ("lora_te_x.alpha", "lora_te_x", "alpha"),
        ("a.b.lora_A.weight", "a.b", "lora_down"),
        ("a.b.lora_B.default.weight", "a.b", "lora_up"),
        ("a.b.lora_B.bias", "a.b", "lora_up.bias"),
        ("a.b.lora_magnitude_vector", "a.b", "magnitude"),
        ("a.b.lora_magnitude_vector.default.weight", "a.b", "magnitude"),
        ("a.attn1.processor.to_q_lora.down.weight", "a.attn1.to_q", "lora_down"),
        ("a.attn1.processor.to_out_lora.up.weight", "a.attn1.to_out.0", "lora_up"),
        ("a.to_k.lora.down.weight", "a.to_k", "lora_down"),
        ("te.q_proj.lora_linear_layer.up.weight", "te.q_proj", "lora_up"),
        ("oft_unet_x.oft_blocks.2", "oft_unet_x", "oft_blocks.2"),
        ("blocks.0.diff_m", "blocks.0", "diff_m"),
        ("lycoris_x.a1.weight", "lycoris_x", "a1"),
        ("x.on_input", "x", "on_input"),
        ("x.weight", "x", "weight"),
    ],
)  # fmt: skip
def test_split_key(key, module, suffix):
    assert split_key(key) == (module, suffix)


@pytest.mark.parametrize("key", ["emb_params", "x.lora_up.weight.extra", "x.q_layer.lora", "alpha", ""])
def test_split_key_of_unknown_ends(key):
    assert split_key(key) is None
