"""Threads and workers chosen by the work: the same figures with any number of workers, and none left behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from emomerge.errors import BadInput
from emomerge.experiment.outline import outline, outline_table
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import parse_recipe
from emomerge.training import RunDir, work

DIFFERENT = {"seconds", "cpu_seconds", "created", "path", "selected"}
"""Fields of results.json that name the folder or the time."""


@pytest.fixture
def recipe(tiny_recipe):
    changes = {"optimizers": ["sens", "cats"]}
    controls = ["best-single", "adamw-sweep", "long-run", "distance-matched"]
    return {**tiny_recipe, "runs": {**tiny_recipe["runs"], **changes}, "controls": controls, "merge": tiny_recipe["merge"][:2]}


def figures(found):
    if isinstance(found, dict):
        return {key: figures(value) for key, value in found.items() if key not in DIFFERENT}
    return [figures(value) for value in found] if isinstance(found, list) else found


def finished(recipe, out, workers):
    pipeline = Pipeline(parse_recipe(recipe), out, workers=workers)
    assert pipeline.run()
    return pipeline, figures(json.loads((out / "results.json").read_text()))


def test_two_workers_find_what_one_does_to_the_bit(recipe, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    _, alone = finished(recipe, tmp_path / "one", 1)
    trained, train = [], Pipeline.train
    monkeypatch.setattr(Pipeline, "train", lambda self, specs=None: trained.append(specs) or train(self, specs))
    pipeline, together = finished(recipe, tmp_path / "two", 2)
    assert together == alone
    assert trained == [None]  # workers had the controls before their stage
    runs = {run.path.name: run for run in map(RunDir, (tmp_path / "two" / "runs").glob("long-*"))}
    assert [run.state["sha256"] for run in runs.values()] == [
        RunDir(tmp_path / "one" / "runs" / name).state["sha256"] for name in runs
    ]
    assert pipeline.crew.engine is None  # ended
    assert Pipeline(parse_recipe(recipe), tmp_path / "two").run() is False


@pytest.mark.slow
def test_a_control_that_diverges_in_a_worker_is_recorded(recipe, tmp_path):
    torch.set_num_threads(1)
    recipe["controls"] = ["best-single", "adamw-long-run"]
    recipe["rival"] = {"learning_rates": [1e30], "snapshots": 3}
    pipeline = Pipeline(parse_recipe(recipe), tmp_path / "out", workers=2)
    pipeline.run()
    (error,) = pipeline.space.stamp("controls")["diverged"]
    assert "long-adamw-1e+30-0 failed" in error


@pytest.mark.slow
@pytest.mark.parametrize("after", ["base", "runs/sens-0", "merges/tall-mask"])
def test_killed_anywhere_no_worker_stays_and_the_same_command_resumes(recipe, tmp_path, after):
    torch.set_num_threads(1)
    recipe["runs"]["steps"] = 60
    _, expected = finished(recipe, tmp_path / "whole", 1)
    code = (
        "import sys, yaml; from pathlib import Path; from emomerge.experiment.pipeline import Pipeline;"
        "from emomerge.recipe import parse_recipe; import torch; torch.set_num_threads(1);"
        "Pipeline(parse_recipe(yaml.safe_load(open('r.yaml'))), Path('out'), workers=2).run()"
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    until(lambda: (tmp_path / "out" / after).exists())
    workers = children(run.pid)
    assert workers
    run.send_signal(signal.SIGKILL)
    run.wait()
    until(lambda: not any(map(alive, workers)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == expected


def children(pid):
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hands_follow_the_size_of_products_not_the_machine():
    small = work.Work(product=1e7, flop=1e8, weights=2**20, kept=2**20, seconds=0.01, forward=0.004)
    assert [work.choose_hands(small, cores, 60, 2**34).threads for cores in (1, 2, 64)] == [1, 1, 1]
    assert [work.choose_hands(small, cores, 60, 2**34).workers for cores in (1, 2, 64)] == [1, 2, work.MOST_WORKERS]
    assert work.choose_hands(small, 2, 3, 2**34) == work.Hands(1, 1)  # too short for workers

    large = work.Work(product=7e10, flop=1e13, weights=2**34, kept=2**30, seconds=9, forward=3)
    assert work.choose_hands(large, 16, 1e4, 2**36) == work.Hands(1, 16)


def test_workers_that_do_not_fit_into_memory_are_not_started():
    each = 3 * 2**30
    wide = work.Work(product=1e9, flop=1e11, weights=each, kept=0, seconds=1, forward=0.3)
    assert work.choose_hands(wide, 4, 1e3, 100 * each).workers == 4
    assert work.choose_hands(wide, 4, 1e3, 14 * each).workers == 2
    assert work.choose_hands(wide, 4, 1e3, each).workers == 1


def test_a_user_who_gives_torch_fewer_threads_bounds_the_cores():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert work.usable_cores() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [work.LARGEST_TRIED, 0])
def test_work_counts_the_operations_of_products_and_changes_nothing(limit, monkeypatch):
    from torch import nn

    class Task:
        def loss(self, model, batch):
            return model(batch["x"]).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3, bias=False)).train()
    before, drawn = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    batch = {"x": torch.randn(11, 5, generator=torch.Generator().manual_seed(1))}
    monkeypatch.setattr(work, "LARGEST_TRIED", limit)
    found = work.measure_work(Task(), model, batch)
    sizes = [2 * 11 * 5 * 7, 2 * 11 * 7 * 3]
    assert found.flop == sum(sizes)
    assert found.per_rank == 4 * (5 + 7 + 7 + 3)
    assert found.kept >= 4 * 11 * (7 + 3) and 0 < found.forward < found.seconds
    assert found.product == pytest.approx(sum(size**2 for size in sizes) / sum(sizes))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_disk_that_is_plainly_too_small_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10_000))
    torch.set_num_threads(1)
    with pytest.raises(BadInput, match=r"the disk is too small.*out.*MB free.*found 0 MB"):
        Pipeline(parse_recipe(recipe), tmp_path / "out").run()
    assert not (tmp_path / "out" / "base").exists()


def test_without_a_measured_pass_the_plan_counts_passes_only(recipe, tmp_path):
    found = outline(Pipeline(parse_recipe(recipe), tmp_path / "out"))
    assert found["seconds"] is found["memory"] is found["disk"] is None
    table = outline_table(found)
    assert [column.header for column in table.columns] == ["", "stage", "work", "passes of 8"]
    assert table.row_count == len(found["stages"]) + 1
