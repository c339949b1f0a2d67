"""--json: errors as JSON on standard error, nothing beside the document on standard output. Successes: test_examples.py."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from command_world import invoke

from emomerge.cli import main
from emomerge.cli.schema import schema_of
from emomerge.errors import MissingExtra

jsonschema = pytest.importorskip("jsonschema")


def error_of(*args, status=2):
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    found = json.loads(result.stderr.splitlines()[-1])
    jsonschema.Draft202012Validator(schema_of("error")).validate(found)
    assert found["error"]["exit_status"] == status
    return found["error"]


def test_the_parts_of_an_error(tmp_path):
    found = error_of("report", str(tmp_path))
    assert found["what"] == "no results here"
    assert found["where"] == str(tmp_path / "results.json")
    assert found["fix"] == "run the recipe to its end first"
    assert found["expected"] is None
    found = error_of("methods", "tise")
    assert "ties" in str(found.values())


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("merge", "a", "b", "--method", "ties"), "Missing option '-o' / '--out'"),
        (("merge", "a", "b", "-o", "x", "--lambda", "3"), "a parameter of a merge method is not an option"),
        (("bake", "base", "run", "-o", "x", "--dtype", "int8"), "'int8' is not one of"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_wrong_options_are_reported_as_json_too(args, what):
    assert what in error_of(*args)["what"]


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, tmp_path):
    def missing(feature, *extras):
        raise MissingExtra(feature, ["altair"], ["report"])

    monkeypatch.setattr("emomerge.cli.command.require", missing)
    found = error_of("report", str(tmp_path))
    assert found["what"] == "emomerge report needs altair"
    assert found["fix"] == "pip install 'emomerge[report]'"


def test_an_interruption(monkeypatch):
    def stopped(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("emomerge.merging.find_method", stopped)
    assert error_of("methods", "ties", status=130)["what"].startswith("interrupted")


def test_help_is_unchanged_by_json():
    result = CliRunner().invoke(main, ["merge", "--help", "--json"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize(
    "line",
    [
        "emomerge merge base run-a run-b --method mean --as-lora 3 -o adapter --json",
        "emomerge merge base run-a run-b --method mean -o m.safetensors --json",
        "emomerge inspect base base --json",
        "emomerge inspect sd_xl_base_1.0.safetensors --json",
        "emomerge inspect out/digits/runs/sens-0 --json",
        "emomerge schema -o recipe.json --json",
        "emomerge schema error --json",
        "emomerge schema schema --json",
        "emomerge init autoencoder --json",
        "emomerge train-all recipes/digits.yaml --json",
    ],
)
def test_other_forms_of_the_outputs_fit_their_schemas(line, world, tiny_bert):
    result = invoke(line, tiny_bert)
    assert result.exit_code == 0, result.output
    jsonschema.Draft202012Validator(schema_of(line.split()[1])).validate(json.loads(result.stdout))
