"""Two processes under torchrun, DDP and FSDP2 on gloo, against one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from emomerge.checkpoints import atomic
from emomerge.errors import RunFailed
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import parse_recipe
from emomerge.training import RunDir, join_ranks

CASES = {
    "ddp": {"sharding": "ddp"},
    "fsdp": {"sharding": "fsdp", "accumulation": 2, "max_grad_norm": 0.5},
    "fsdp, full": {"sharding": "fsdp", "use_shadow": True},
}
RESUMED = ("fsdp, full",)
IDLE = ("key.bias", "k_proj.bias")
"""Changes no output of attention: its gradient is rounding alone, whose sign EmoAiry follows."""
RUNS = ["sens-0", "airy-0"]


def recipe(tiny, case, rows):
    adapter = {"kind": "full"} if "full" in case else {**tiny["adapter"], "dropout": 0.0}
    runs = {
        **tiny["runs"],
        **CASES[case],
        "optimizers": [name[:-2] for name in RUNS],
        "steps": 12,
        "batch_size": rows,
        "parallel": "sequential",
    }
    return parse_recipe({**tiny, "adapter": adapter, "runs": runs})


def made(recipe, out, **options):
    """In float64 where all weights are trained: gradients that are zero but for rounding, EmoSens makes as large as any."""
    pipeline = Pipeline(recipe, out, **options)
    if recipe.adapter.kind == "full":
        reload, loss = pipeline.task.reload_model, pipeline.task.loss
        pipeline.task.reload_model = lambda *args, **more: reload(*args, **more).double()
        pipeline.task.loss = lambda model, batch: loss(
            model, {**batch, "pixel_values": batch["pixel_values"].to(next(model.parameters()).dtype)}
        )
    return pipeline


def on_every_rank(folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    tiny = json.loads((folder / "tiny.json").read_text())
    ranks = join_ranks()
    if not ranks.leads:
        atomic.new_path = None  # it writes nothing

    def train(case, out):
        pipeline = made(ranks.recipe(recipe(tiny, case, 4)), folder / out, ranks=ranks)
        if ranks.rank == 1 and out == "poisoned":
            poison(pipeline)
        if not ranks.leads:
            pipeline.follow()
            return
        try:
            pipeline.train_all()
        except RunFailed as error:
            (folder / out / "error").write_text(str(error))
        ranks.announce(None)

    for case in CASES:
        train(case, case)
    for case in RESUMED:
        train(case, f"{case}, resumed")
    train("ddp", "poisoned")
    ranks.leave()


def poison(pipeline):
    """NaN on this rank only, at the third step of the first run."""
    calls, real = iter(range(1000)), pipeline.task.loss
    pipeline.task.loss = lambda model, batch: real(model, batch) * (float("nan") if next(calls) == 2 else 1)


@pytest.fixture(scope="module")
def folder(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.json").write_text(json.dumps(tiny_recipe))
    torch.set_num_threads(1)
    for case in CASES:
        made(recipe(tiny_recipe, case, 8), folder / f"{case}, alone").train_all()
    for case in RESUMED:  # one process is stopped after the checkpoint of step 2
        stopped = made(recipe(tiny_recipe, case, 8), folder / f"{case}, resumed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDir, "append_metrics", stop_at_three(RunDir.append_metrics))
            for name in RUNS:
                with pytest.raises(KeyboardInterrupt):
                    stopped.train_all([name[:-2]])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    subprocess.run([sys.executable, *command], env=environment, check=True)
    return folder


def stop_at_three(append):
    def stopping(run, row):
        append(run, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    return stopping


def weights(folder, name):
    (file,) = RunDir(folder / "runs" / name).artefact.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("out", [*CASES, *(f"{case}, resumed" for case in RESUMED)])
def test_two_ranks_equal_one_process_with_twice_the_batch(folder, out, name):
    alone = folder / f"{out.removesuffix(', resumed')}, alone"
    # Rounding grows where small second moments divide, and where the rate follows differences of losses.
    atol, of_rates = (1e-8, 1e-6) if "full" in out else (1e-5, 1e-5)
    ours, theirs = weights(folder / out, name), weights(alone, name)
    assert ours.keys() == theirs.keys()
    moved = max(float((theirs[key] - base).abs().max()) for key, base in starting_point(folder / out, theirs).items())
    assert moved > 1e-3
    for key in [key for key in theirs if not key.endswith(IDLE)]:
        torch.testing.assert_close(ours[key], theirs[key], atol=atol, rtol=0)
    rows, expected = (list(RunDir(place / "runs" / name).metrics()) for place in (folder / out, alone))
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=atol)
        assert row["rate"] == pytest.approx(other["rate"], rel=of_rates)


def starting_point(out, like):
    """The base's tensors where a run has such, else zeros, as LoRA's B has."""
    base = load_file(out / "base" / "model.safetensors")
    return {key: base.get(key, torch.zeros_like(t)) for key, t in like.items() if key in base or "lora_B" in key}


def test_a_loss_that_is_not_finite_on_one_rank_ends_that_run_on_both(folder):
    states = {name: RunDir(folder / "poisoned" / "runs" / name).state["state"] for name in RUNS}
    assert states == {"sens-0": "failed", "airy-0": "done"}
    assert "run sens-0 failed: " in (folder / "poisoned" / "error").read_text()
    assert " at step 3, rows " in (folder / "poisoned" / "error").read_text()
    undisturbed = weights(folder / "ddp", "airy-0")
    assert all(torch.equal(t, undisturbed[key]) for key, t in weights(folder / "poisoned", "airy-0").items())


@pytest.mark.slow
def test_torchrun_of_the_command_line(tiny_recipe, tmp_path):
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**tiny_recipe, "runs": {**tiny_recipe["runs"], "optimizers": ["sens", "cats"]}}))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "emomerge", "run"]
    first = subprocess.run([*command, str(file), "-o", str(out), "--json"], env=environment, capture_output=True, check=True)
    assert json.loads(first.stdout)["recipe"]["runs"]["batch_size"] == 2 * tiny_recipe["runs"]["batch_size"]
    again = subprocess.run([*command, str(file), "-o", str(out)], env=environment, capture_output=True, check=True)
    assert b"Nothing to do" in again.stdout
    wrong = [*command, str(file), "-o", str(tmp_path / "new"), "--set", "task.train=nowhere/at-all.png"]
    failed = subprocess.run(wrong, env=environment, capture_output=True, check=False)
    assert failed.returncode != 0
    assert b"emomerge: no such data file or folder: nowhere/at-all.png" in failed.stderr


if __name__ == "__main__":
    on_every_rank(Path(sys.argv[1]))
