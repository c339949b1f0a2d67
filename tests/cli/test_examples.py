"""Every example of every command's help works as printed, and again with --json, whose output its published schema accepts."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_world import invoke

from emomerge.cli import main
from emomerge.cli.outputs import OUTPUTS
from emomerge.cli.schema import schema_of

ELSEWHERE = {
    "emomerge push out/digits me/digits-merged --private": "the Hub; test_push.py uploads to a server of its own",
    "emomerge run recipes/movie-reviews.yaml --executor slurm --executor-set slurm_partition=gpu": "a cluster",
    "emomerge train-all recipes/movie-reviews.yaml --executor ray --executor-set num_gpus=1": "Ray, and a GPU",
    "emomerge probe recipes/digits.yaml out/digits/merges/tall-mask -o probed --preset full --executor ray": "Ray",
}
"""Example → what it needs that a test has not. `tests/training` runs the executors."""


def examples(command: str) -> list[str]:
    """The command lines of an example, without redirections of their output and what follows them."""
    return [line.strip().partition(" > ")[0] for line in main.commands[command].example.strip().splitlines()]


def without_output(line: str) -> str:
    """Remove what an earlier example of the command has written, if this one writes the same."""
    words = shlex.split(line)
    target = Path(words[words.index("-o") + 1]) if "-o" in words else None
    if target is not None and words[1] not in ("run", "train-all", "probe"):
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    return line


def test_every_command_has_an_example_and_the_options_json_and_quiet():
    for name, command in main.commands.items():
        assert any(line.startswith(f"emomerge {name}") for line in examples(name))
        assert {"--json", "--quiet"} <= {option for parameter in command.params for option in parameter.opts}, name
    known = {line for name in main.commands for line in examples(name)}
    assert set(ELSEWHERE) <= known


def test_every_command_has_a_schema():
    assert set(OUTPUTS) == set(main.commands)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_the_examples_work_and_their_json_is_what_the_schema_says(command, world, tiny_bert):
    jsonschema = pytest.importorskip("jsonschema")
    for line in examples(command):
        if line in ELSEWHERE:
            continue
        plain = invoke(without_output(line), tiny_bert)
        assert plain.exit_code == 0, f"{line}\n{plain.output}"
        with_json = invoke(without_output(f"{line} --json"), tiny_bert)
        assert with_json.exit_code == 0, f"{line} --json\n{with_json.output}"
        schema = schema_of(shlex.split(line)[1])
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator(schema).validate(json.loads(with_json.stdout))
