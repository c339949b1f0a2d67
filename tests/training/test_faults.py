"""What goes wrong while five runs are trained: nothing is lost, the others go on, and one line says what it was."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from emomerge.checkpoints import atomic
from emomerge.cli import main
from emomerge.tasks.image_classification import ImageClassificationTask
from emomerge.training import Context, RunDir, planned_runs, train_locally

FAMILY = ["sens-0", "airy-0", "cats-0", "tion-0", "void-0"]
CHILDREN = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if CHILDREN:
    CHILDREN.set_forkserver_preload(["emomerge.experiment.pipeline", "transformers", "peft", "altair", "sklearn.datasets"])


# kill -9


def train_until_killed(recipe, spec, folder, base_folder, step, delay):
    torch.set_num_threads(1)
    train_here(recipe, spec, folder, base_folder, lambda spec, row: row["step"] == step and kill_after(delay))


def kill_after(seconds):
    """End this process as `kill -9` does, while it goes on with whatever comes next."""
    threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL))).start()


def train_here(recipe, spec, folder, base_folder, on_step=lambda spec, row: None):
    task = ImageClassificationTask(recipe.task)
    train_locally(Context(recipe, base_folder, "b", folder).using(task, task.load_data(recipe.base)), [spec], on_step=on_step)


@pytest.mark.skipif(CHILDREN is None, reason="needs fork")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_at_five_random_moments_runs_end_with_the_same_bits(digits, base_folder, tmp_path, seed):
    recipe = digits[0]
    whole = {}
    for spec in planned_runs(recipe):
        train_here(recipe, spec, tmp_path / "whole", base_folder)
        whole[spec.name] = RunDir(tmp_path / "whole" / spec.name).state["sha256"]
    draws = random.Random(seed)
    for trial in range(5):
        spec, folder = draws.choice(planned_runs(recipe)), tmp_path / str(trial)
        step, delay = draws.randint(1, recipe.runs.steps), draws.uniform(0, 0.01)
        child = CHILDREN.Process(target=train_until_killed, args=(recipe, spec, folder, base_folder, step, delay))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        train_here(recipe, spec, folder, base_folder)
        run = RunDir(folder / spec.name)
        assert run.state["sha256"] == whole[spec.name]
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
        assert {file.name for file in run.path.iterdir()} == {"run.json", "metrics.jsonl", "adapter"}


# The rest of the table, as somebody at the command line meets it.


@pytest.fixture(scope="module")
def one_by_one(tiny_recipe):
    return {**tiny_recipe, "runs": {**tiny_recipe["runs"], "parallel": "sequential"}}


@pytest.fixture(scope="module")
def healthy(one_by_one, tmp_path_factory):
    """The five runs, undisturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(one_by_one))
    train_all(folder / "tiny.yaml", folder / "out")
    return folder


@pytest.fixture
def out(healthy, tmp_path):
    """A folder with the base only."""
    shutil.copytree(healthy / "out", tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    return tmp_path / "out"


def train_all(recipe, out, *, status=0):
    """The line on standard error, if there is to be one."""
    form = ["--json"] if status == 0 else []  # errors as text
    result = CliRunner().invoke(main, ["train-all", str(recipe), "-o", str(out), "--parallel", "sequential", "--quiet", *form])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if status == 0:
        return json.loads(result.stdout)
    (line,) = result.stderr.splitlines()
    return line


def hashes(out):
    return {name: RunDir(out / "runs" / name).state.get("sha256") for name in FAMILY}


def states(out):
    return {name: RunDir(out / "runs" / name).state.get("state") for name in FAMILY}


@pytest.fixture
def at(monkeypatch):
    """Let something happen once, after a step of a run."""
    real = RunDir.append_metrics

    def at(name, step, action):
        def append_metrics(run, row):
            real(run, row)
            if (run.path.name, row["step"]) == (name, step):
                monkeypatch.setattr(RunDir, "append_metrics", real)
                action(run)

        monkeypatch.setattr(RunDir, "append_metrics", append_metrics)

    return at


class SmallDisk:
    """A file system of 512 kB in a folder."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self.folder, self._filler = folder, folder / "filler"
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
        self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self):
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def empty(self):
        self._filler.unlink()

    def remove(self):
        subprocess.run(["umount", self.folder], check=True)


class PretendedDisk:
    """The same where one may not mount: no file there comes to the disk while it is full."""

    def __init__(self, folder, monkeypatch):
        self.full, sync = False, atomic._sync

        def refusing(path):
            if self.full and folder in path.parents:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(path)

        monkeypatch.setattr(atomic, "_sync", refusing)

    def fill(self):
        self.full = True

    def empty(self):
        self.full = False


@pytest.fixture(params=["real", "pretended"])
def small_disk(request, out, monkeypatch):
    """A disk of its own for the run airy-0."""
    if request.param == "pretended":
        yield PretendedDisk(out / "runs" / "airy-0", monkeypatch)
        return
    disk = SmallDisk(out / "runs" / "airy-0")
    if not disk.mounted:
        pytest.skip("needs to mount a file system")
    yield disk
    disk.remove()


@pytest.mark.parametrize("full_at", [2, 3])
def test_a_disk_that_is_full_at_a_checkpoint_or_between(healthy, out, small_disk, at, full_at):
    at("airy-0", full_at, lambda run: small_disk.fill())
    line = train_all(healthy / "tiny.yaml", out, status=2)
    assert line.startswith("emomerge: the disk is full: ")
    assert "airy-0" in line
    assert states(out) | {"airy-0": "done"} == dict.fromkeys(FAMILY, "done")  # the others
    assert states(out)["airy-0"] != "done"
    assert RunDir(out / "runs" / "airy-0").checkpoint.exists() == (full_at == 3)  # that of step 2
    small_disk.empty()
    train_all(healthy / "tiny.yaml", out)
    assert hashes(out) == hashes(healthy / "out")


def test_a_loss_of_one_run_that_is_not_finite(healthy, out, monkeypatch):
    calls, real = iter(range(1000)), ImageClassificationTask.loss

    def loss(task, model, batch):  # of the third run's fourth step
        return real(task, model, batch) * (float("nan") if next(calls) == 2 * 6 + 3 else 1)

    monkeypatch.setattr(ImageClassificationTask, "loss", loss)
    line = train_all(healthy / "tiny.yaml", out, status=1)
    assert "run cats-0 failed" in line
    assert "at step 4, rows " in line
    assert states(out) == dict.fromkeys(FAMILY, "done") | {"cats-0": "failed"}
    assert RunDir(out / "runs" / "cats-0").checkpoint.exists()
    monkeypatch.undo()
    train_all(healthy / "tiny.yaml", out)
    assert hashes(out) == hashes(healthy / "out")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_base_that_vanishes_meanwhile(healthy, one_by_one, tmp_path, at, kind):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**one_by_one, "adapter": one_by_one["adapter"] if kind == "lora" else {"kind": kind}}))
    train_all(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    at("airy-0", 3, lambda run: (out / "base").rename(tmp_path / "elsewhere"))
    line = train_all(recipe, out, status=2)
    assert f"no such model folder: {out / 'base'}" in line
    assert (f"the base folder is missing: {out / 'base'}" in line) == (kind == "full")
    assert states(out)["sens-0"] == "done"
    assert states(out)["airy-0"] == ("done" if kind == "lora" else "failed")  # an adapter is written without its base
    (tmp_path / "elsewhere").rename(out / "base")
    train_all(recipe, out)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_row_that_cannot_be_read(tiny_recipe, tmp_path):
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(16):
            shade = 128 * (name == "light") + 4 * number
            Image.new("L", (8, 8), shade).save(tmp_path / "images" / name / f"{number}.png")
    recipe = tmp_path / "tiny.yaml"
    task = {"kind": "image-classification", "train": str(tmp_path / "images"), "eval_fraction": 0.25}
    recipe.write_text(yaml.safe_dump({**tiny_recipe, "task": task}))
    image = tmp_path / "images/dark/3.png"
    content = image.read_bytes()
    image.write_bytes(content[:45])
    line = train_all(recipe, tmp_path / "out", status=2)
    assert f"the image cannot be read: {image}" in line
    assert not (tmp_path / "out").exists()
    image.write_bytes(content)
    train_all(recipe, tmp_path / "out")
