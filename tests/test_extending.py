"""The six additions in CONTRIBUTING.md are applied to a copy of the package and work from a recipe to the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDITIONS = {
    title: match[1]
    for title, body in re.findall(r"^## Add an? (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    if (match := re.search(r"^```diff\n(.*?)^```$", body, re.MULTILINE | re.DOTALL))
}
RECIPE = re.search(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]


def test_there_is_one_for_each_table() -> None:
    assert set(ADDITIONS) == {"optimizer", "merge method", "adapter format", "task", "metric", "figure"}


@pytest.mark.parametrize("what", ADDITIONS)
def test_an_addition_is_one_file_one_test_and_one_table_entry(what: str) -> None:
    files = re.split(r"^diff --git .*\n", ADDITIONS[what], flags=re.MULTILINE)[1:]
    new = [file for file in files if file.startswith("new file")]
    changed = [file for file in files if file not in new]
    paths = sorted(re.search(r"^\+\+\+ b/(.+)$", file, re.MULTILINE)[1].partition("/")[0] for file in new)
    assert paths == ["emomerge", "tests"]
    assert len(changed) == 1
    assert changed[0].count("\n@@ ") == 1
    assert not re.search(r"^-(?!-- )", changed[0], re.MULTILINE), "an addition takes nothing away"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests with all additions."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("emomerge", "tests", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for diff in ADDITIONS.values():
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    (folder / "extended.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


Call = Callable[..., str]


@pytest.fixture(scope="module")
def call(copy: Path) -> Call:
    """Run `python -m` with the copy, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_tests_of_the_additions_pass(copy: Path, call: Call) -> None:
    files = re.findall(r"^\+\+\+ b/(tests/.+)$", "\n".join(ADDITIONS.values()), re.MULTILINE)
    assert len(files) == 6
    assert re.search(r"\b6 passed|^\.{6} ", call("pytest", *files), re.MULTILINE)


def test_a_recipe_uses_them_up_to_the_report(copy: Path, call: Call) -> None:
    results = json.loads(call("emomerge", "run", "extended.yaml", "-o", "out", "--quiet", "--json"))
    rows = {row["name"]: row for row in results["artefacts"]}
    assert results["data"]["summary"] == "600 vectors of 5 bits"
    assert rows["sign-0"]["optimizer"] == "sign"
    assert rows["median"]["method"] == "median"
    assert {"title": "largest-weight"}.items() <= next(c for c in results["columns"] if c["key"] == "largest-weight").items()
    assert rows["median"]["estimates"]["largest-weight"]["mean"] > 0
    page = (copy / "out/report.html").read_text(encoding="utf-8")
    assert 'id="distances"' in page
    assert "largest-weight" in page
    assert (copy / "out/figures/distances.png").is_file()


def test_an_adapter_of_the_new_format_is_measured_and_reported(copy: Path, call: Call) -> None:
    call("emomerge", "train-all", "extended.yaml", "-o", "out", "--quiet")  # the base, where the test above did not run
    from emomerge.checkpoints import open_checkpoint

    base = open_checkpoint(copy / "out/base")
    file = copy / "shifted.difference.safetensors"
    save_file({name: torch.full(base.info(name).shape, 0.01) for name in base}, file)
    assert json.loads(call("emomerge", "inspect", str(file), "--json"))["kind"] == "adapter"
    base_option = ("--base", str(copy / "out/base"))
    call("emomerge", "probe", "extended.yaml", str(file), *base_option, "-o", "probed", "--quiet")
    call("emomerge", "report", "probed")
    rows = {row["name"]: row for row in json.loads((copy / "probed/results.json").read_text())["artefacts"]}
    length = 0.01 * sum(base.info(name).numel for name in base) ** 0.5
    assert rows[file.name]["estimates"]["distance"]["mean"] == pytest.approx(length, rel=1e-4)
    assert file.name in (copy / "probed/report.html").read_text(encoding="utf-8")
