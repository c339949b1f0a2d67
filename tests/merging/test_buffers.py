"""Merges of networks with batch norm: running statistics and counters follow their own rules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput
from emomerge.merging import METHODS, merge
from emomerge.merging.masks import mask_files, reconstruct


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.fixture
def trained() -> tuple[MemoryCheckpoint, list[MemoryCheckpoint]]:
    """A base and three runs of different length, whose activations vary far less or more than the base's."""
    torch.manual_seed(0)
    base = network()
    runs = []
    for steps, size in ((2, 0.01), (5, 0.1), (40, 1.5)):
        run = copy.deepcopy(base).train()
        with torch.no_grad():
            for parameter in run.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for _ in range(steps):
                run(size * torch.randn(8, 1, 8, 8))
        runs.append(MemoryCheckpoint(run.state_dict(), source=f"run of {steps}"))
    return MemoryCheckpoint(base.state_dict(), source="base"), runs


NEEDS = {"greedy-soup": {"held_out_loss": lambda checkpoint: float(checkpoint["1.running_var"].sum())}}
ELSEWHERE = {"fisher", "slerp"}  # one reads further files, the other takes two runs


@pytest.mark.parametrize("method", sorted(METHODS.keys() - ELSEWHERE))
def test_no_method_touches_statistics_or_counters(method, trained):
    base, runs = trained
    try:
        merged = merge(base, runs, method=method, scale=1.7, **NEEDS.get(method, {}))
    except BadInput as error:
        pytest.skip(f"needs more than runs: {error}")
    for name in ("1.running_mean", "1.running_var"):
        mean = torch.stack([run[name] for run in runs]).mean(dim=0)
        torch.testing.assert_close(merged[name], mean, rtol=1e-5, atol=1e-7)
    assert merged["1.num_batches_tracked"] == 40
    warnings = " ".join(merged.diagnostics()["warnings"])
    assert "1.running_mean and 1 more" in warnings
    assert "largest value: 1.num_batches_tracked" in warnings


@pytest.mark.parametrize("weights", [[1.0, -1.0, 0.5], [-1.0, -1.0, -1.0], [3.0, 0.0, -8.0]])
def test_variances_are_never_negative(weights, trained):
    base, runs = trained
    merged = merge(base, runs, method="task-arithmetic", weights=weights, scale=3.0)
    positive = [max(weight, 0.0) for weight in weights]
    shares = positive if any(positive) else [1.0] * 3
    expected = sum(share * run["1.running_var"] for share, run in zip(shares, runs, strict=True)) / sum(shares)
    torch.testing.assert_close(merged["1.running_var"], expected, rtol=1e-5, atol=1e-7)
    dead = MemoryCheckpoint({**runs[0], "1.running_var": torch.zeros(4)}, source="dead")
    assert (merge(base, [dead] * 3, method="mean")["1.running_var"] >= 0).all()


def test_a_merge_without_batch_norm_keeps_its_thresholds(trained):
    base, runs = trained
    plain = [{name: tensor for name, tensor in each.items() if "running" not in name} for each in (base, *runs)]
    whole = merge(base, runs, method="ties", trim="global")
    some = merge(MemoryCheckpoint(plain[0]), [MemoryCheckpoint(run) for run in plain[1:]], method="ties", trim="global")
    assert all(torch.equal(whole[name], some[name]) for name in some)


def test_masks_restore_a_run_with_usable_statistics(trained, tmp_path):
    base, runs = trained
    merged = merge(base, runs, method="tall-mask", reference="sum", names=["a", "b", "c"])
    write_checkpoint(merged, tmp_path / "out", beside=mask_files(merged))
    for run in "abc":
        restored = reconstruct(tmp_path / "out", run, base)
        torch.testing.assert_close(restored["1.running_var"], merged["1.running_var"])


def test_other_integer_tensors_still_have_to_agree(trained):
    base, runs = trained
    states = [{**dict(each), "table": torch.arange(3) + i} for i, each in enumerate((base, *runs))]
    base, *runs = map(MemoryCheckpoint, states)
    with pytest.raises(BadInput, match="table"):
        merge(base, runs, method="mean")["table"]


def test_statistics_given_for_the_merged_weights_are_written(trained, tmp_path):
    base, runs = trained
    merged = merge(base, runs, method="mean")
    merged.set_statistics({"1.running_var": torch.full((4,), 0.25), "0.weight": torch.zeros(4, 1, 3, 3)})
    write_checkpoint(merged, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    torch.testing.assert_close(written["1.running_var"], torch.full((4,), 0.25))
    assert written["0.weight"].any()
    assert "re-estimate" in " ".join(merged.diagnostics()["warnings"])  # the means are still averages
