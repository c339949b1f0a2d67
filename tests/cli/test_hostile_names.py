"""Names from files reach the terminal, cards and pages as text; what is interrupted says what is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from emomerge.cli import main
from emomerge.cli.command import command
from emomerge.progress import Display
from emomerge.reporting import Card, model_card
from emomerge.results import Results, load_results

NAMES = ["[/]", "[bold]x[/bold]", "a\x1b[2Jb", "c\x9b31md", ":smile:", "[link=http://x]y", "e\u202ef"]
EFFECTS = [*map(chr, range(0x0A)), *map(chr, range(0x0B, 0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e"]


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], env={"COLUMNS": "300"})


def literal(text):
    return not [effect for effect in EFFECTS if effect in text]


@pytest.fixture
def models(tmp_path):
    """A base and two runs whose tensors and files have such names."""
    for number, file in enumerate(("base", "one[bold]", "two\x1b[31m")):
        save_file({name: torch.full((3, 3), float(number)) for name in NAMES}, tmp_path / f"{file}.safetensors")
    return tmp_path


def test_tables_show_names_literally(models):
    base, one, two = sorted(models.glob("*.safetensors"))
    for arguments in ((base,), (base, two), (one, two)):
        result = call("inspect", *arguments)
        assert result.exit_code == 0, result.output
        assert literal(result.output)
    assert "[bold]x[/bold]" in result.output and ":smile:" in result.output and r"a\x1b[2Jb" in result.output
    assert set(NAMES) == {row["name"] for row in json.loads(call("inspect", base, two, "--json").stdout)["changed"]}


def test_merges_show_names_literally_and_write_literal_cards(models):
    base, one, two = sorted(models.glob("*.safetensors"))
    result = call("merge", base, one, two, "--method", "mean", "-o", models / "out[bold]\x1b[1m")
    assert result.exit_code == 0, result.output
    assert literal(result.output) and r"out[bold]\x1b[1m" in result.output
    (out,) = (path for path in models.iterdir() if path.is_dir())
    assert literal((out / "README.md").read_text())
    result = call("merge", base, one, two, "--method", "mean", "--as-lora", "2", "--allow-partial", "-o", models / "lora")
    assert literal(result.output)


def test_errors_show_names_literally(models):
    result = call("merge", models / "base.safetensors", models / "none\x1b[31m", "-o", models / "out")
    assert result.exit_code == 2 and literal(result.output) and r"\x1b" in result.stderr


def test_progress_shows_notes_literally(capsys):
    display = Display()
    with display.live():
        line = display.line("[/]", 2)
        line.add(1, "[/x]\x1b[5m")
        display.say("[/]\x9b1m")
    assert r"[/]\x9b1m" in capsys.readouterr().err


def test_results_and_cards_hold_no_effects(tmp_path):
    name = "x\x1b[31m"
    plain = {
        "schema_version": 2,
        "name": name,
        "recipe_yaml": f"name: {name}\nb: 1\n",
        "artefacts": [{"name": name, "role": "run"}],
    }
    (tmp_path / "results.json").write_text(json.dumps(plain))
    results = load_results(tmp_path)
    assert results.name == results.artefacts[0].name == r"x\x1b[31m"
    assert results.recipe_yaml.count("\n") == 2
    assert literal(model_card(Card(title=name, about=name, command=name, params={name: name}, results=results)))


def test_elements_in_names_are_text_on_the_page():
    from emomerge.reporting.report import environment

    names = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><script>alert(2)</script>", "{{ 7 * 7 }}"]
    results = Results.model_validate(
        {
            "schema_version": 2,
            "name": names[0],
            "command": names[1],
            "recipe_yaml": names[2],
            "artefacts": [{"name": name, "role": "run", "method": name, "path": name, "estimates": {}} for name in names],
            "columns": [{"key": "k", "title": names[0], "meaning": names[1]}],
            "merges": {
                names[2]: {"method": names[0], "runs": [names[1]], "warnings": [names[0]], "params": {names[0]: names[2]}}
            },
        }
    )
    from emomerge.reporting.report import _page

    page = _page(results, {})
    assert environment().autoescape
    assert "<script>alert" not in page and "<img src=x" not in page and "49" not in page.partition("{{ 7 * 7 }}")[0][-20:]
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(("resumes", "left"), [(True, "the same command resumes"), (False, "nothing was written")])
@pytest.mark.parametrize(("stop", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)])
def test_an_interrupted_command_says_what_is_left(monkeypatch, resumes, left, stop, word, status):
    monkeypatch.setattr(main, "commands", dict(main.commands))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT

    def work():
        """Wait for a signal."""
        os.kill(os.getpid(), stop)
        time.sleep(5)

    try:
        result = CliRunner().invoke(command("wait", "emomerge wait", resumes=resumes)(work), [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == status
    assert result.stderr == f"emomerge: {word}; {left}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_terminated_merge_leaves_nothing(tmp_path):
    """SIGTERM while a model is being written: one line, and no temporary folder."""
    code = (
        "import os, signal, sys, torch\n"
        "from emomerge.cli import main\n"
        "import emomerge.checkpoints.writer as writer\n"
        "whole = writer._rounded\n"
        "def rounded(*args):\n"
        "    assert [p for p in os.listdir('.') if p.endswith('.tmp')]\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return whole(*args)\n"
        "writer._rounded = rounded\n"
        "main(['merge', 'base.safetensors', 'run.safetensors', '--method', 'mean', '-o', 'out', '--quiet'])\n"
    )
    for number, name in enumerate(("base", "run")):
        save_file({"a": torch.full((3, 3), float(number))}, tmp_path / f"{name}.safetensors")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == "emomerge: terminated; nothing was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "run.safetensors"]


def test_sums_that_overflow_are_announced_and_json_stays_json(tmp_path):
    for number, name in enumerate(("base", "one", "two")):
        save_file({"a": torch.full((4, 4), number * 1e160, dtype=torch.float64)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    result = call("merge", *files, "--method", "mean", "-o", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    for text in (result.stdout, (tmp_path / "out" / "merge.json").read_text()):
        found = json.loads(text, parse_constant=pytest.fail)["diagnostics"]
        assert found["merged_norm"] is None
        assert any("overflow" in warning for warning in found["warnings"])
    compared = json.loads(call("inspect", files[0], files[2], "--json").stdout, parse_constant=pytest.fail)
    assert compared["all"]["norm"] is None


@pytest.mark.parametrize("size", ["9" * 400, "9" * 400 + "GB", "1e400", "-1", "0", "nanGB", "1" + "0" * 5000])
def test_sizes_of_the_command_line(tmp_path, size):
    save_file({"a": torch.ones(3)}, tmp_path / "base.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "run.safetensors")
    files = [tmp_path / "base.safetensors", tmp_path / "run.safetensors"]
    result = call("merge", *files, "--method", "mean", "-o", tmp_path / "out", "--max-shard-size", size)
    assert result.exit_code == 2 and "not a size" in result.stderr and len(result.stderr) < 3000


def test_signals_are_left_alone_in_other_threads(tmp_path):
    done = []
    worker = threading.Thread(target=lambda: done.append(call("methods").exit_code))
    worker.start()
    worker.join()
    assert done == [0]
