"""Ray on a cluster of two nodes, and Slurm through submitit's stand-in: the bits of one process, even if a worker dies."""

import contextlib
import os
from pathlib import Path

import pytest
from dying import train_and_die_once

from emomerge.errors import BadInput
from emomerge.training import Context, RunDir, open_engine, planned_runs, train_in_workers, train_locally

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def two_ray_nodes():
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield {}
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def jobs_without_slurm():
    import submitit

    submitit.core.core.Job._results_timeout_s = 0  # a file system of our own shows results at once
    yield {"cluster": "local"}


@pytest.mark.parametrize(("name", "cluster"), [("ray", two_ray_nodes), ("slurm", jobs_without_slurm)])
def test_the_same_adapters_as_in_one_process(digits, base_folder, tmp_path, monkeypatch, name, cluster):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[name])
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]))
    recipe, task, data = digits
    runs = recipe.runs.model_copy(
        update={"optimizers": ("sens", "cats", "void"), "steps": 40, "checkpoint_every": 10, "parallel": "sequential"}
    )
    recipe = recipe.model_copy(update={"runs": runs})
    specs = planned_runs(recipe)
    train_locally(Context(recipe, base_folder, "b", tmp_path / "here").using(task, data), specs)
    begun = []
    with cluster() as settings:
        engine = open_engine(name, max_parallel=2, settings=settings, folder=tmp_path / "slurm")
        submit = engine.submit
        monkeypatch.setattr(
            engine,
            "submit",
            lambda work, job: begun.append(job.spec.name) or submit(train_and_die_once, tmp_path / "dead", job),
        )
        train_in_workers(engine, Context(recipe, base_folder, "b", tmp_path / "there"), specs)
    assert sorted(begun) == ["cats-0", "cats-0", "sens-0", "void-0"]
    for spec in specs:
        run = RunDir(tmp_path / "there" / spec.name)
        assert run.state["state"] == "done"
        assert run.state["sha256"] == RunDir(tmp_path / "here" / spec.name).state["sha256"]
        assert [row["step"] for row in run.metrics()] == list(range(1, 41))


def test_wrong_settings_are_told_at_once(tmp_path):
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        pytest.importorskip(package)
        with pytest.raises(BadInput, match="nonsense"):
            open_engine(
                name, max_parallel=None, settings={"nonsense": 1, **({"cluster": "local"} if name == "slurm" else {})},
                folder=tmp_path / "slurm",
            )  # fmt: skip
    with pytest.raises(BadInput, match="submitit cannot submit jobs"):  # here is no Slurm
        open_engine("slurm", max_parallel=None, settings={}, folder=tmp_path / "slurm")
    assert not (tmp_path / "slurm").exists()
