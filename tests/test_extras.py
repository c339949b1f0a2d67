"""Optional packages: one line that names the extra, and nothing hidden."""

import sys

import pytest
from click.testing import CliRunner

from emomerge import extras
from emomerge.cli import main
from emomerge.errors import BadInput, MissingExtra


@pytest.fixture
def without_peft_and_altair(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("peft", "altair") else object())
    monkeypatch.setattr(extras.metadata, "version", lambda name: "999")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["run", "digits"], "emomerge: emomerge run needs peft, altair; pip install 'emomerge[train,report]'"),
        (["train-all", "digits"], "emomerge: emomerge train-all needs peft; pip install 'emomerge[train]'"),
        (["probe", "digits", "m", "-o", "out"], "emomerge: emomerge probe needs peft; pip install 'emomerge[train]'"),
        (["report", "out"], "emomerge: emomerge report needs altair; pip install 'emomerge[report]'"),
    ],
)
def test_a_command_names_the_extra_it_lacks(without_peft_and_altair, command, line):
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.stderr.strip()) == (2, line)


def test_a_package_that_is_too_old_counts_as_missing(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(extras.metadata, "version", lambda name: "4.44.2" if name == "transformers" else "999")
    monkeypatch.setattr(extras.metadata, "requires", lambda name: ["torch>=2.6", 'transformers<6,>=5.0; extra == "train"'])
    with pytest.raises(MissingExtra, match=r"^training needs transformers 5\.0 or newer \(found 4\.44\.2\); pip install"):
        extras.require("training", "train")


def test_installed_packages_pass(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(extras.metadata, "version", lambda name: "4.10.0rc1")
    monkeypatch.setattr(extras.metadata, "requires", lambda name: ['datasets>=4.2; extra == "train"'])
    extras.require("training", "train")


def test_a_failed_import_of_an_optional_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)  # Python's way to make an import fail
    with (
        pytest.raises(MissingExtra, match=r"^a figure needs altair; pip install 'emomerge\[report\]'$"),
        extras.needed_by("a figure"),
    ):
        import altair  # noqa: F401


def test_other_errors_pass_unchanged():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), extras.needed_by("a figure"):
        import no_such_package  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), extras.needed_by("a figure"):
        from json import no_such_function  # noqa: F401
    with pytest.raises(BadInput), extras.needed_by("a figure"):
        raise BadInput("no such file")
