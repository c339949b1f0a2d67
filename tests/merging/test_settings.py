"""Numbers that differ from tensor to tensor and from run to run."""

import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import check_params, merge
from emomerge.merging.settings import layer_count, layer_positions, resolve
from emomerge.recipe import Merge

NAMES = ["embed.w", "h.0.attn.w", "h.0.mlp.w", "h.2.attn.w", "h.4.attn.w", "h.4.experts.7.w", "vision.0.w"]


def one(setting, **more):
    return {name: numbers[0] for name, numbers in resolve(setting, NAMES, what="t", **more).items()}


def test_the_first_number_of_a_name_is_its_layer():
    assert layer_positions(NAMES) == dict(zip(NAMES, [0, 0, 0, 0.5, 1, 1, 1], strict=True))
    assert layer_positions(["0.weight", "3.weight", "x2.b"]) == {"0.weight": 0, "3.weight": 1, "x2.b": 0}
    assert (layer_count(NAMES), layer_count(["w"])) == (5, 0)


def test_a_gradient_is_interpolated_over_the_layers():
    assert one([0.0, 1.0])["h.2.attn.w"] == 0.5
    assert one([0, 1, 0]) == dict(zip(NAMES, [0, 0, 0, 1, 0, 0, 0], strict=True))
    assert one([2, 4, 10, 20])["h.2.attn.w"] == pytest.approx(7)
    assert set(one([3]).values()) == {3}


def test_the_first_entry_that_matches_counts():
    setting = [{"filter": "attn", "value": [0, 1]}, {"filter": "h.0", "value": 5}, {"filter": "*", "value": 7}]
    assert one(setting) == dict(zip(NAMES, [7, 0, 5, 0.5, 1, 7, 7], strict=True))
    assert one({"filter": "mlp", "value": 5}, default=1.0)["h.0.attn.w"] == 1


def test_entries_of_one_run():
    setting = [{"run": 2, "filter": "mlp", "value": 5}, {"run": "c", "value": 6}, {"value": 7}]
    resolved = resolve(setting, NAMES, ["a", "b", "c"], what="density")
    assert resolved["h.0.mlp.w"] == (7, 5, 6)
    assert resolved["embed.w"] == (7, 7, 6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([{"filter": "atn", "value": 1}, {"value": 2}], "matches no tensor's name: t; found 'atn'"),
        ([{"filter": "attn", "value": 1}], "t has no number for a tensor: embed.w"),
        ([{"run": 4, "value": 1}], "a run that is not merged: t; expected a, b; found 4"),
    ],
)
def test_an_entry_that_can_never_apply_is_refused(setting, message):
    with pytest.raises(BadInput) as error:
        resolve(setting, NAMES, ["a", "b"], what="t")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("ties", {"density": []}, "`density` of ties"),
        ("ties", {"density": [0.5, 2]}, "expected less than or equal to 1"),
        ("ties", {"density": [{"filter": "a", "value": 0}]}, "expected greater than 0"),
        ("ties", {"density": [{"fliter": "a", "value": 1}]}, "`density` of ties"),
        ("slerp", {"t": [{"run": 1, "value": 1}]}, "`t` of slerp"),
        ("slerp", {"t": "half"}, "expected a valid number"),
        ("mean", {"weights": [[0.1, "x"]]}, "`weights` of mean"),
        ("mean", {"scale": {"filter": "a"}}, "`scale` of mean"),
    ],
)
def test_wrong_settings_name_their_parameter(method, params, message):
    with pytest.raises(BadInput) as error:
        check_params(method, params)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes_hold_settings():
    density = [{"filter": "mlp", "run": "sens-0", "value": [0.1, 0.5]}, {"value": 0.2}]
    spec = Merge.model_validate({"method": "ties", "density": density, "scale": [0.5, 1]})
    checked = check_params(spec.method, spec.params)
    assert (checked["density"], checked["scale"]) == (density, [0.5, 1])
    assert check_params(spec.method, checked) == checked


@pytest.fixture
def runs(exact_run):
    base = MemoryCheckpoint({name: torch.zeros(3) for name in NAMES})
    return base, [exact_run(base, {name: torch.full((3,), float(x)) for name in NAMES}) for x in (1, 2, 4)]


def test_weights_of_each_run_by_layer(runs):
    base, opened = runs
    weights = [1.0, [0.0, 2.0], [{"filter": "mlp", "value": 5}, {"value": 0}]]
    merged = merge(base, opened, method="mean", weights=weights)
    assert merged["embed.w"][0] == 1
    assert merged["h.2.attn.w"][0] == (1 + 2) / 2
    assert merged["h.0.mlp.w"][0].item() == pytest.approx((1 + 4 * 5) / 6)
    summed = merge(base, opened, method="task-arithmetic", weights=weights)
    assert summed["h.4.attn.w"][0] == 1 + 2 * 2
    assert merged.diagnostics()["params"]["weights"] == weights
    with pytest.raises(BadInput, match=r"positive sum: embed\.w"):
        merge(base, opened, method="mean", weights=[[0, 1]] * 3)


def test_scale_by_layer(runs):
    base, opened = runs
    setting = [{"filter": "attn", "value": [0, 1]}, {"value": 3}]
    merged = merge(base, opened[:1], method="mean", scale=setting)
    assert {name: float(merged[name][0]) for name in NAMES} == one(setting)
    assert merged.delta("h.2.attn.w", base)[0] == 0.5
    assert merged.diagnostics()["params"]["scale"] == setting


def test_t_by_layer(runs):
    base, opened = runs
    merged = merge(base, opened[:2], method="slerp", t=[0, 1])
    assert [float(merged[f"h.{i}.attn.w"][0]) for i in (0, 2, 4)] == [1, 1.5, 2]


def test_density_of_each_run_and_tensor(exact_run):
    base = MemoryCheckpoint({name: torch.zeros(20) for name in ("h.0.w", "h.1.w")})
    run = exact_run(base, {name: torch.arange(1.0, 21) for name in base})
    density = [{"run": 1, "value": [0.1, 0.5]}, {"value": 1.0}]
    report = merge(base, [run, run], method="ties", trim="tensor", density=density).diagnostics()
    assert list(report["mask_density"].values()) == [(0.1 + 0.5) / 2, 1.0]
    by_run = [{"run": 1, "value": 0.1}, {"run": 2, "value": 0.5}]
    report = merge(base, [run, run], method="ties", density=by_run).diagnostics()
    assert list(report["mask_density"].values()) == [0.15, 0.55]  # the paper keeps all that equal the threshold
    with pytest.raises(BadInput, match=r"threshold over all tensors needs one density.*trim: global; set trim: tensor"):
        merge(base, [run, run], method="ties", density=density)
