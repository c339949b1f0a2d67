"""Runs in workers: the same bits as in this process, whoever dies on the way; and one worker a directory."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import yaml
from click.testing import CliRunner
from dying import train_and_die_once

from emomerge.cli import main
from emomerge.errors import BadInput, RunFailed
from emomerge.training import (
    Context,
    RunDir,
    execute,
    holder_of,
    lease,
    open_engine,
    planned_runs,
    train_in_workers,
    train_locally,
    workers,
)
from emomerge.training.lease import LeaseLost, leased

CHILDREN = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")


@pytest.fixture
def recipe(digits):
    runs = digits[0].runs.model_copy(update={"optimizers": ("sens", "cats", "void"), "parallel": "sequential"})
    return digits[0].model_copy(update={"runs": runs})


@pytest.fixture
def here(recipe, digits, base_folder, tmp_path):
    """SHA-256 of every adapter as trained one after the other in this process."""

    def here(recipe=recipe):
        _, task, data = digits
        train_locally(Context(recipe, base_folder, "b", tmp_path / "here").using(task, data), planned_runs(recipe))
        return hashes(recipe, tmp_path / "here")

    return here


def hashes(recipe, folder):
    return {spec.name: RunDir(folder / spec.name).state.get("sha256") for spec in planned_runs(recipe)}


class Synchronous:
    """An engine without workers: calls happen at once, or are lost as often as `losses` says of the run."""

    max_parallel = 2

    def __init__(self, losses=None):
        self.losses, self.begun, self.cancelled = dict(losses or {}), [], 0

    def submit(self, function, *args):
        name = args[0].spec.name
        self.begun.append(name)
        lost = self.losses.get(name, 0) > 0
        self.losses[name] = self.losses.get(name, 0) - 1
        return Call(self, None if lost else function(*args), lost)


class Call:
    def __init__(self, engine, returned, lost):
        self.engine, self.returned, self.lost = engine, returned, lost

    def done(self):
        return True

    def result(self):
        if self.lost:
            raise RuntimeError("a worker that died")
        return self.returned

    def cancel(self):
        self.engine.cancelled += 1


@pytest.fixture
def train(recipe, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "POLL", 0.01)

    def train(engine, recipe=recipe, base_folder=base_folder, **options):
        train_in_workers(engine, Context(recipe, base_folder, "b", tmp_path / "runs"), planned_runs(recipe), **options)
        return hashes(recipe, tmp_path / "runs")

    return train


def test_processes_end_with_the_same_bits_even_if_one_is_killed(train, recipe, here, tmp_path, monkeypatch):
    changes = {"optimizers": ("sens", "cats"), "steps": 40, "checkpoint_every": 10}
    recipe = recipe.model_copy(update={"runs": recipe.runs.model_copy(update=changes)})
    engine = open_engine("local", max_parallel=2, settings={}, folder=tmp_path)
    begun, seen, submit = [], {}, engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda work, job: begun.append(job.spec.name) or submit(train_and_die_once, tmp_path / "dead", job)
    )
    assert train(engine, recipe, on_step=lambda spec, row: seen.update({spec.name: row["step"]})) == here(recipe)
    assert sorted(begun) == ["cats-0", "cats-0", "sens-0"]
    assert seen == {"sens-0": 40, "cats-0": 40}
    assert [row["step"] for row in RunDir(tmp_path / "runs" / "cats-0").metrics()] == list(range(1, 41))
    assert not list((tmp_path / "runs").rglob(".lease"))


def test_a_lost_worker_is_begun_again_twice_and_then_given_up(train, tmp_path):
    engine = Synchronous({"sens-0": 2, "cats-0": 3})
    with pytest.raises(RunFailed, match="run cats-0 failed: its worker was lost 3 times, at last by a worker that died"):
        train(engine)
    assert sorted(engine.begun) == ["cats-0"] * 3 + ["sens-0"] * 3 + ["void-0"]
    states = {name: RunDir(tmp_path / "runs" / name).state.get("state") for name in ("sens-0", "cats-0", "void-0")}
    assert states == {"sens-0": "done", "cats-0": None, "void-0": "done"}


def test_workers_train_what_is_not_done_and_nothing_twice(train, here, tmp_path):
    assert train(Synchronous()) == here()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    train(Synchronous())
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}


def test_what_all_workers_lack_is_said_once_and_stays_bad_input(train, tmp_path):
    engine = Synchronous()
    with pytest.raises(BadInput, match="nowhere") as error:
        train(engine, base_folder=tmp_path / "nowhere")
    assert str(error.value).count("nowhere") == 1
    assert len(engine.begun) == 3


def test_runs_that_shall_share_a_pass_are_no_work_for_workers(train, recipe):
    with pytest.raises(BadInput, match="one process"):
        train(Synchronous(), recipe.model_copy(update={"runs": recipe.runs.model_copy(update={"parallel": "stacked"})}))


def test_a_mistake_of_ours_in_a_worker_is_told_and_not_tried_again(train, monkeypatch, capsys):
    monkeypatch.setattr(execute, "train_run", lambda *args, **options: 1 / 0)
    engine = Synchronous()
    with pytest.raises(RunFailed, match="run sens-0 failed: ZeroDivisionError: division by zero"):
        train(engine)
    assert len(engine.begun) == 3
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_all_workers_end(train):
    engine = Synchronous()

    def interrupt(spec, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(engine, on_step=interrupt)
    assert engine.cancelled == 2
    assert len(engine.begun) == 2  # and the third was not begun


def test_a_local_worker_ends_with_the_one_who_started_it(tmp_path):
    launcher = CHILDREN.Process(target=launch, args=(str(tmp_path),))
    launcher.start()
    until(lambda: (tmp_path / "worker").exists())
    worker = int((tmp_path / "worker").read_text())
    launcher.kill()
    launcher.join()
    until(lambda: not alive(worker))


def launch(folder):
    engine = open_engine("local", max_parallel=2, settings={}, folder=Path(folder))
    engine.submit(write_pid, folder)
    time.sleep(600)


def write_pid(folder):
    file = Path(folder, "pid")
    file.write_text(str(os.getpid()))
    file.rename(Path(folder, "worker"))
    time.sleep(600)


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# The lease of a directory.


def hold(folder, duration, heartbeat):
    lease.DURATION, lease.HEARTBEAT = duration, heartbeat
    with leased(Path(folder)) as check:
        Path(folder, "held").touch()
        while True:
            time.sleep(0.05)
            try:
                check()
            except LeaseLost:
                Path(folder, "noticed").touch()
                return


@pytest.fixture
def held(tmp_path):
    """A process that holds a lease, by default with the durations of the product."""
    started = []

    def held(duration=lease.DURATION, heartbeat=lease.HEARTBEAT):
        process = CHILDREN.Process(target=hold, args=(str(tmp_path), duration, heartbeat))
        process.start()
        started.append(process)
        until((tmp_path / "held").exists)
        return process

    yield held
    for process in started:
        process.kill()
        process.join()


def test_a_directory_has_one_worker_and_that_of_a_dead_one_is_free(held, tmp_path):
    process = held()
    holder = holder_of(tmp_path)
    assert (holder.host, holder.pid) == (socket.gethostname(), process.pid)
    assert 0 <= holder.heartbeat < 60
    with pytest.raises(filelock.Timeout):
        lease._lease(tmp_path).acquire(timeout=0.3)
    process.kill()
    process.join()
    assert holder_of(tmp_path) is None
    started = time.monotonic()
    with leased(tmp_path) as check:
        check()
        assert holder_of(tmp_path).pid == os.getpid()
    assert time.monotonic() - started < lease.DURATION / 4
    assert holder_of(tmp_path) is None


def test_who_gives_no_sign_of_life_is_replaced_and_notices(held, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "DURATION", 1.0)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    process = held(1.0, 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    with leased(tmp_path) as check:  # after a second without a heartbeat
        os.kill(process.pid, signal.SIGCONT)
        until((tmp_path / "noticed").exists)
        check()


def test_whoever_comes_second_waits_and_finds_the_run_done(digits, base_folder, tmp_path, monkeypatch):
    recipe, task, data = digits
    context = Context(recipe, base_folder, "b", tmp_path).using(task, data)
    spec = planned_runs(recipe)[0]
    entered, real = [], execute.leased

    @contextlib.contextmanager
    def others_first(folder):  # another process had the lease, and has trained the run when it is ours
        if not entered:
            entered.append(folder)
            train_locally(context, [spec])
        with real(folder) as check:
            yield check

    monkeypatch.setattr(execute, "leased", others_first)
    steps = []
    train_locally(context, [spec], on_step=lambda *step: steps.append(step))
    assert entered
    assert not steps


def test_a_lost_lease_stops_the_run_and_it_is_taken_up_again(digits, base_folder, tmp_path, monkeypatch):
    recipe, task, data = digits
    spec, lost = planned_runs(recipe)[0], []
    real = execute.leased

    @contextlib.contextmanager
    def losing(folder):
        with real(folder) as check:
            calls = iter(range(100))

            def lose():
                if not lost and next(calls) == 3:
                    lost.append(folder)
                    raise LeaseLost("for the test")
                check()

            yield lose

    monkeypatch.setattr(execute, "leased", losing)
    context = Context(recipe, base_folder, "b", tmp_path).using(task, data)
    train_locally(context, [spec])
    assert lost
    assert RunDir(tmp_path / spec.name).state["state"] == "done"
    assert [row["step"] for row in RunDir(tmp_path / spec.name).metrics()] == [1, 2, 3, 4, 5, 6]


# What is refused.


@pytest.mark.parametrize(("name", "words"), [("ray", "emomerge.ray"), ("slurm", "emomerge.slurm")])
def test_an_engine_that_is_not_installed_says_what_to_install(name, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[name], None)
    with pytest.raises(BadInput, match=words):
        open_engine(name, max_parallel=None, settings={}, folder=tmp_path)


def test_local_workers_have_no_settings(tmp_path):
    with pytest.raises(BadInput, match="local workers have no settings; found num_gpus"):
        open_engine("local", max_parallel=2, settings={"num_gpus": 1}, folder=tmp_path)
    assert open_engine("local", max_parallel=None, settings={}, folder=tmp_path) is None


def test_settings_of_the_command_line_are_checked(tmp_path):
    command = ["train-all", "digits", "-o", str(tmp_path / "out")]
    for settings in (["--executor-set", "num_gpus"], ["--executor-set", "num_gpus=1"]):
        result = CliRunner().invoke(main, [*command, *settings])
        assert result.exit_code == 2
        assert "num_gpus" in result.stderr
    assert not (tmp_path / "out").exists()


def test_status_says_who_trains_what(tiny_recipe, tmp_path):
    recipe = {**tiny_recipe, "runs": {**tiny_recipe["runs"], "optimizers": ["sens", "cats"]}, "merge": [{"method": "mean"}]}
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    options = ["-o", str(out), "--only", "sens", "--max-parallel", "2", "--quiet"]
    assert CliRunner().invoke(main, ["train-all", str(file), *options]).exit_code == 0

    def runs():
        found = json.loads(CliRunner().invoke(main, ["status", str(out), "--json"]).stdout)
        return found["busy"], {run["name"]: (run["state"], run["worker"] and run["worker"]["pid"]) for run in found["runs"]}

    assert runs() == (False, {"sens-0": ("done", None), "cats-0": ("waiting", None)})
    watching = threading.Thread(target=lambda: seen.append(CliRunner().invoke(main, ["status", str(out), "--watch"])))
    seen = []
    with leased(out / "runs" / "cats-0"):
        assert runs() == (True, {"sens-0": ("done", None), "cats-0": ("running", os.getpid())})
        shown = CliRunner().invoke(main, ["status", str(out)], terminal_width=200).stdout
        assert f"{os.getpid()}" in shown
        watching.start()
        watching.join(0.3)
        assert watching.is_alive()
    watching.join(60)
    assert seen[0].exit_code == 0
