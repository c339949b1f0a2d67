import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emomerge.cli import main

COMMANDS = ["run", "train-all", "bake", "merge", "methods", "reconstruct", "probe", "report", "inspect", "status", "init"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(result, *words, status=2):
    """The command ended with this status and one line on standard error, which says all of these words."""
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("emomerge: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**tiny_recipe, "controls": [], "merge": [{"method": "mean"}]}))
    result = call("run", folder / "tiny.yaml", "-o", folder / "out")
    assert result.exit_code == 0, result.output
    return folder


def test_a_dry_run_shows_the_work_and_does_nothing(finished, tmp_path):
    def stages(*more):
        result = call("run", finished / "tiny.yaml", "--dry-run", "--json", *more)
        assert result.exit_code == 0, result.output
        return {row["stage"]: row for row in json.loads(result.stdout)["stages"]}

    new = stages("-o", tmp_path / "new", "--set", "controls=[adamw-sweep, long-run]")
    assert list(new) == ["base", "runs", "control adamw-sweep", "control long-run", "merge mean", "probe", "report"]
    assert not any(row["done"] for row in new.values())
    assert (new["runs"]["passes"], new["control adamw-sweep"]["passes"], new["control long-run"]["passes"]) == (30, 30, 30)
    assert not (tmp_path / "new").exists()
    before = {file: file.stat().st_mtime_ns for file in (finished / "out").rglob("*")}
    assert all(row["done"] for row in stages("-o", finished / "out").values())
    half = stages("-o", finished / "out", "--set", "merge=[{method: mean}, {method: ties, density: 0.5}]")
    assert [name for name, row in half.items() if not row["done"]] == ["merge ties", "probe", "report"]
    assert before == {file: file.stat().st_mtime_ns for file in (finished / "out").rglob("*")}
    assert (new["base"]["passes"], new["probe"]["passes"] > 0) == (20 * 64 / 8, True)
    assert all(row["seconds"] > 0 for name, row in new.items() if name != "report")
    shown = call("run", finished / "tiny.yaml", "--dry-run", "-o", tmp_path / "new").stdout
    assert "passes of 8" in shown and "about" in shown and "Memory: about" in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())


@pytest.fixture
def models(tmp_path):
    """A base and two runs as single files."""
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(8, 4, generator=generator), "b.bias": torch.randn(5, generator=generator)}
    save_file(base, tmp_path / "base.safetensors")
    for name in ("one", "two"):
        moved = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(moved, tmp_path / f"{name}.safetensors")
    return tmp_path


def merge(models, *more, runs=("one", "two"), out="merged"):
    return call("merge", models / "base.safetensors", *(models / f"{r}.safetensors" for r in runs), "-o", models / out, *more)


# What works.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"emomerge {command}" in result.output.split("Example", 1)[1]


def test_help_lists_every_command():
    shown = call("--help").output
    assert all(command in shown for command in COMMANDS)


def test_run_prints_the_table_the_verdict_and_the_page(finished):
    result = call("run", finished / "tiny.yaml", "-o", finished / "out")
    assert result.exit_code == 0
    assert "Nothing to do" in result.stdout
    for word in ("base", "sens-0", "void-0", "mean", "report.html", "The merge mean"):
        assert word in result.stdout
    printed = json.loads(call("run", finished / "tiny.yaml", "-o", finished / "out", "--json").stdout)
    assert printed["selected"]["name"] in [a["name"] for a in printed["artefacts"]]


def test_status_and_train_all(finished):
    result = call("status", finished / "out")
    assert result.exit_code == 0
    assert "6/6" in result.stdout
    assert {r["state"] for r in json.loads(call("status", finished / "out", "--json").stdout)["runs"]} == {"done"}
    again = call("train-all", finished / "tiny.yaml", "-o", finished / "out", "--only", "sens,cats")
    assert again.exit_code == 0
    assert "Nothing to do" in again.output


def test_report_is_drawn_again(finished, tmp_path):
    assert call("report", finished / "out", "-o", tmp_path / "page.html").exit_code == 0
    fails(call("report", finished / "out", "-o", tmp_path / "page.html"), "exists", "--force")
    assert "<html" in (tmp_path / "page.html").read_text()


def test_bake_probe_and_inspect(finished, tmp_path):
    out = finished / "out"
    adapter = out / "runs/sens-0/adapter"
    assert call("bake", out / "base", adapter, "-o", tmp_path / "baked").exit_code == 0
    assert (tmp_path / "baked/config.json").exists()
    compared = json.loads(call("inspect", tmp_path / "baked", out / "base", "--json").stdout)
    assert compared["changed"]
    assert not compared["only_here"]
    same = json.loads(call("inspect", out / "base", out / "base", "--json").stdout)
    assert not same["changed"]
    two = json.loads(call("inspect", out / "runs/sens-0", out / "runs/cats-0", "--json").stdout)
    assert all("lora_" in row["name"] for row in two["changed"])
    for path in (out / "base", adapter, out / "runs/sens-0"):
        assert json.loads(call("inspect", path, "--json").stdout)["tensors"] > 0
        assert call("inspect", path).exit_code == 0
    probed = call(
        "probe",
        finished / "tiny.yaml",
        tmp_path / "baked",
        out / "runs/cats-0",
        "-o",
        tmp_path / "probed",
        "--base",
        out / "base",
        "--metric",
        "curve",
    )
    assert probed.exit_code == 0, probed.output
    rows = json.loads((tmp_path / "probed/results.json").read_text())["artefacts"]
    assert [row["name"] for row in rows] == ["base", "baked", "cats-0"]
    assert not any(key.startswith("sharpness") for row in rows for key in row["estimates"])
    fails(call("probe", finished / "tiny.yaml", out / "base", "-o", out, "--base", out / "base"), "results of its own")
    run = next(a for a in json.loads((out / "results.json").read_text())["artefacts"] if a["name"] == "sens-0")
    losses = [row["estimates"]["test_loss"]["mean"] for row in (rows[1], run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "ties", "tall-mask"])
def test_merge_writes_a_file_or_a_folder(models, method):
    assert merge(models, "--method", method, out="m.safetensors").exit_code == 0
    assert merge(models, "--method", method, "--json").exit_code == 0
    assert load_file(models / "m.safetensors").keys() == load_file(models / "base.safetensors").keys()
    record = json.loads((models / "merged/merge.json").read_text())
    assert record["diagnostics"]["lambda_crit"] == 1
    assert (models / "merged/README.md").read_text().startswith("---")


def test_merge_options_arrive(models):
    options = ("--method", "task-arithmetic", "--weight", 2, "--weight", -1, "--scale", "0.5")
    assert merge(models, *options, out="m.safetensors").exit_code == 0
    base, one, two = (load_file(models / f"{n}.safetensors")["b.bias"] for n in ("base", "one", "two"))
    expected = base + 0.5 * (2 * (one - base) - (two - base))
    assert torch.allclose(load_file(models / "m.safetensors")["b.bias"], expected, atol=1e-6)


def test_merge_with_a_recipe_chooses_by_its_validation_data(finished, tmp_path):
    out = finished / "out"
    result = call(
        "merge", out / "base", out / "runs/sens-0", out / "runs/cats-0", "--method", "greedy-soup",
        "--recipe", finished / "tiny.yaml", "-o", tmp_path / "soup", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    members = json.loads(result.stdout)["diagnostics"]["params"]["members"]
    assert 1 <= len(members) <= 2
    assert {member.rpartition("/")[2] for member in members} <= {"sens-0", "cats-0"}
    assert call("merge", "--again", tmp_path / "soup", "-o", tmp_path / "again", "--quiet").exit_code == 0
    for name in ("model.safetensors", "merge.json"):
        assert (tmp_path / "soup" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    extended = call("merge", "--extend", tmp_path / "soup", out / "runs/airy-0", "-o", tmp_path / "more")
    assert extended.exit_code == 0
    assert "greedy-soup depends on all runs at once and makes its choices from scratch" in extended.stderr
    recipe = (finished / "tiny.yaml").read_text()
    (finished / "tiny.yaml").write_text(recipe + "\n")
    fails(call("merge", "--again", tmp_path / "soup", "-o", tmp_path / "third"), "tiny.yaml", "has changed")
    (finished / "tiny.yaml").write_text(recipe)

    assert call("merge", "--again", out / "merges/mean", "-o", tmp_path / "mean", "--quiet").exit_code == 0
    assert (tmp_path / "mean/model.safetensors").read_bytes() == (out / "merges/mean/model.safetensors").read_bytes()
    record = json.loads((out / "merges/mean/merge.json").read_text())
    assert record["rounding_loss"]["unchanged"] == 0
    (tmp_path / "bare.json").write_text(json.dumps({**record, "base_sha256": {}}))
    fails(call("merge", "--again", tmp_path / "bare.json", "-o", tmp_path / "third"), "lacks the hashes")


def test_lora_runs_become_one_adapter(finished, tmp_path):
    out = finished / "out"
    runs = sorted((out / "runs").iterdir())
    merging = ("merge", out / "base", *runs, "--method", "mean", "--quiet", "--json")
    adapter = json.loads(call(*merging, "--as-lora", 2 * len(runs), "-o", tmp_path / "adapter").stdout)["adapter"]
    assert adapter["energy"] == pytest.approx(1, abs=1e-6)
    assert not adapter["left_out"]
    assert call(*merging, "--dtype", "float32", "-o", tmp_path / "dense").exit_code == 0
    assert call("bake", out / "base", tmp_path / "adapter", "--dtype", "float32", "-o", tmp_path / "baked").exit_code == 0
    dense, baked = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "baked"))
    assert all(torch.allclose(dense[name], baked[name], rtol=0, atol=1e-5) for name in dense)
    half = json.loads(call(*merging, "--as-lora", "auto", "--energy", 0.5, "-o", tmp_path / "half").stdout)["adapter"]
    assert 0.5 <= half["energy"] < 0.999


def test_init_writes_a_recipe_that_parses(tmp_path):
    from emomerge.recipe import load_recipe

    for name in ("digits", "movie-reviews", "fashion-mnist", "causal-lm", "flow-fashion", "autoencoder"):
        assert call("init", name, "-o", tmp_path / f"{name}.yaml").exit_code == 0
        assert load_recipe(tmp_path / f"{name}.yaml").name == name
        assert name in call("init", "--help").output
    assert load_recipe(tmp_path / "autoencoder.yaml").task.function == f"{tmp_path / 'autoencoder.py'}:make"
    fails(call("init", "autoencoder", "-o", tmp_path / "other.yaml"), "autoencoder.py", "exists")
    assert not (tmp_path / "other.yaml").exists()
    fails(call("init", "digits", "-o", tmp_path / "digits.yaml"), "exists")
    fails(call("init", "nonsense"), "no such recipe comes with emomerge", "digits")


# What is refused: one line, status 2, nothing half-written.


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_unknown_recipe_key(recipe_file, tmp_path):
    before = listing(tmp_path)
    fails(
        call("run", recipe_file, "-o", tmp_path / "out", "--set", "runs.stepz=3"), "unknown recipe key", "did you mean `steps`?"
    )
    fails(call("run", tmp_path / "absent.yaml"), "no such recipe", "absent.yaml")
    assert listing(tmp_path) == before


def test_missing_data_and_base(recipe_file, tmp_path):
    fails(call("run", recipe_file, "-o", tmp_path / "out", "--set", "task.train=absent.csv"), "absent.csv")
    fails(call("merge", tmp_path / "absent.safetensors", tmp_path / "x", "-o", tmp_path / "m"), "absent.safetensors")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def reviews(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n" + "good film,pos\nbad film,neg\n" * 40 + "odd film,meh\n")
    recipe = {
        "name": "reviews",
        "base": {"model": str(tmp_path / "none")},
        "task": {"kind": "text-classification", "train": str(tmp_path / "reviews.csv"), "classes": ["neg", "pos"]},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_wrong_column_and_label_outside_the_classes(reviews):
    run = ("run", reviews / "r.yaml", "-o", reviews / "out")
    fails(call(*run, "--set", "task.columns.text=txt"), "no column 'txt'", "text")
    fails(call(*run), "label outside the classes", "row 82", "'meh'")


def test_truncated_and_pickled_weights(models):
    whole = (models / "one.safetensors").read_bytes()
    (models / "one.safetensors").write_bytes(whole[:-7])
    before = listing(models)
    fails(merge(models), "one.safetensors", "truncated")
    torch.save({"a.weight": torch.zeros(2)}, models / "one.safetensors")
    fails(merge(models), "one.safetensors", "pickle")
    (models / "two.bin").write_bytes(b"")
    fails(call("inspect", models / "two.bin"), "two.bin")
    assert listing(models) == sorted([*before, "two.bin"])


def test_runs_that_do_not_fit(models):
    two = load_file(models / "two.safetensors")
    before = listing(models)
    save_file({**two, "a.weight": torch.zeros(4, 8)}, models / "two.safetensors")
    fails(merge(models), "two", "a.weight", "[8, 4]".replace("[", "").split(",")[0])
    save_file({"a.weight": two["a.weight"]}, models / "two.safetensors")
    fails(merge(models), "two", "b.bias")
    poisoned = two["b.bias"].clone()
    poisoned[3] = float("nan")
    save_file({**two, "b.bias": poisoned}, models / "two.safetensors")
    fails(merge(models), "two", "b.bias")
    fails(merge(models, out="m.safetensors"), "two", "b.bias")
    assert listing(models) == before


def test_adapter_of_another_model(finished, models):
    fails(call("bake", models / "base.safetensors", finished / "out/runs/sens-0/adapter", "-o", models / "baked"), "adapter")
    assert not (models / "baked").exists()


def test_output_that_exists(models):
    assert merge(models).exit_code == 0
    before = (models / "merged/model.safetensors").read_bytes()
    fails(merge(models, "--method", "ties"), "exists", "--force")
    assert (models / "merged/model.safetensors").read_bytes() == before
    assert merge(models, "--method", "ties", "--force").exit_code == 0
    assert (models / "merged/model.safetensors").read_bytes() != before


def test_no_space_left(models, monkeypatch, recipe_file, tmp_path):
    before = listing(models)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        fails(merge(models), "the disk is full", "10 bytes free")
    with monkeypatch.context() as patch:
        patch.setattr("emomerge.checkpoints.writer.write_file", _full_disk)
        fails(merge(models), "the disk is full")
    assert listing(models) == before
    with monkeypatch.context() as patch:
        patch.setattr("emomerge.training.state.save_file", _full_disk)
        fails(call("run", recipe_file, "-o", tmp_path / "out"), "the disk is full")
    assert call("run", recipe_file, "-o", tmp_path / "out", "--quiet").exit_code == 0


def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_index_that_points_outside_its_folder(models):
    folder = models / "sharded"
    folder.mkdir()
    index = {"metadata": {}, "weight_map": {"a.weight": "../one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = listing(models)
    fails(call("merge", models / "base.safetensors", folder, "-o", models / "m"), "../one.safetensors")
    assert listing(models) == before


def test_damaged_folders(models):
    (models / "adapter").mkdir()
    (models / "adapter/adapter_config.json").write_text("{")
    fails(call("inspect", models / "adapter"), "adapter_config.json")
    (models / "results.json").write_text("[]")
    fails(call("report", models), "results cannot be read")


def test_wrong_options(models):
    fails(merge(models, "--method", "tise"), "ties")
    fails(merge(models, "--method", "mean", "--density", 0.2), "density")
    fails(merge(models, "--set", "lambda=big"), "`lambda` of tall-mask", "'big'")
    fails(merge(models, "--set", "lambda=auto"), "--recipe")
    fails(merge(models, "--method", "greedy-soup"), "--recipe")
    fails(merge(models, "--weight", 1), "weight")
    fails(call("status", models), "not an output folder")
    fails(call("report", models), "no results here")


def test_a_failure_inside_the_work_has_status_one(recipe_file, tmp_path):
    result = call(
        "run",
        recipe_file,
        "-o",
        tmp_path / "out",
        "--set",
        "runs.procedure=paper",
        "--set",
        "runs.preset=guarded",
        "--set",
        "runs.lr=1e30",
        "--set",
        "base.prepare.learning_rate=1e30",
    )
    fails(result, "learning_rate", status=1)


@pytest.mark.parametrize(("words", "status"), [(("--version",), 0), (("merge",), 2), (("nonsense",), 2)])
def test_the_process_ends_with_the_status_and_all_that_it_said(words, status):
    done = subprocess.run([sys.executable, "-m", "emomerge", *words], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert ("version" in done.stdout) == (status == 0)
    assert bool(done.stderr) == (status > 0)
