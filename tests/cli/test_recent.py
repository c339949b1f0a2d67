"""`emomerge status` without a folder."""

from __future__ import annotations

import os

import pytest

from emomerge.cli import recent


def output(folder, changed):
    (folder / "stamps").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder / "evaluations.jsonl").write_text("")
    for file in (folder / "stamps", folder / "evaluations.jsonl", folder):
        os.utime(file, (changed, changed))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_below_the_current_folder_the_last_changed_comes_first(home):
    old, new = output(home / "work/out/old", 1000), output(home / "work/out/new", 2000)
    output(home / "work/a/b/c/too-deep", 3000)
    output(home / "work/.hidden/out", 3000)
    assert recent.find_outputs(home / "work") == [new, old]


def test_inside_an_output_folder_it_is_that_one(home):
    here = output(home / "out/here", 1000)
    output(home / "out/there", 2000)
    (here / "runs/sens-0").mkdir(parents=True)
    assert recent.find_outputs(here / "runs/sens-0") == [here]


def test_elsewhere_those_used_last_and_only_if_they_are_still_there(home):
    for number in range(recent.KEPT + 2):
        recent.remember(output(home / f"out/{number}", 1000 + number))
    (home / "empty").mkdir()
    found = recent.find_outputs(home / "empty")
    assert [folder.name for folder in found] == [str(number) for number in range(recent.KEPT + 1, 1, -1)]
    (home / "out/11/recipe.yaml").unlink()
    assert recent.find_outputs(home / "empty")[0].name == "10"


def test_a_home_that_cannot_be_written_is_no_failure(home, monkeypatch):
    (home / "state").write_text("a file where the folder should be")
    recent.remember(home)
    assert recent.find_outputs(home) == []
