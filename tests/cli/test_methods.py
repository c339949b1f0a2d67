import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.cells import cell_len  # combining marks take no column

import emomerge
from emomerge.cli import main
from emomerge.merging import METHODS


def call(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_list_names_every_method_within_80_columns():
    result = call("methods")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(cell_len, lines)) <= 80
    shown = {line.split()[0] for line in lines if line.strip()}
    assert shown >= METHODS.keys()
    assert "Default: tall-mask" in result.output


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_its_parameters_within_80_columns(name):
    result = call("methods", name)
    assert result.exit_code == 0, result.output
    assert max(map(cell_len, result.output.splitlines())) <= 80
    for parameter in METHODS[name].parameters:
        assert f"\n{parameter.name} " in result.output


def test_facts_and_parameters_as_json():
    everything = json.loads(call("methods", "--json").stdout)
    assert [method["name"] for method in everything] == list(METHODS)
    found = json.loads(call("methods", "slerp", "--json").stdout)
    assert found["runs"] == 2
    assert found["parameters"][0] == {
        "name": "t",
        "type": "number | list",
        "default": 0.5,
        "description": "0 is the first run, 1 the second",
    }
    assert [m["name"] for m in everything if m["held_out_loss"] == "required"] == [
        "greedy-soup",
        "metrics-weighted",
        "positioning",
    ]
    assert [m["name"] for m in everything if m["saves_masks"]] == ["tall-mask"]


def test_no_method_is_named_outside_the_registry():
    package = Path(emomerge.__file__).parent
    for file in [*(package / "cli").glob("*.py"), package / "merging/record.py", package / "merging/masks.py"]:
        strings = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & METHODS.keys(), file


def test_an_unknown_method_suggests_the_nearest():
    result = call("methods", "tie")
    assert result.exit_code == 2
    assert "did you mean `ties`?" in result.stderr


def test_describing_methods_needs_no_transformers():
    run = "main(['methods', 'ties'], standalone_mode=False)"
    code = f"import sys; from emomerge.cli import main; {run}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("option", ["--lambda", "--k", "--reference", "--preset", "--trim", "--aggregate", "--max-iter"])
def test_a_parameter_given_as_an_option_is_answered_with_its_set_form(option):
    result = call("merge", "base", "run", option, "1", "-o", "out")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"found {option}; write `--set {option[2:].replace('-', '_')}=VALUE`" in result.stderr


def test_other_unknown_options_are_left_to_click():
    result = call("merge", "base", "run", "--nonsense", "-o", "out")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
