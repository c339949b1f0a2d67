"""Completion in bash, zsh and fish: click's protocol for all three, and a real shell where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment whose PATH begins with an `emomerge` of this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "emomerge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m emomerge "$@"\n')
    (folder / "emomerge").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def said(command, environment, **variables):
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True).stdout


WORDS = [("emomerge me", "1", {"merge", "methods"}), ("emomerge merge --roun", "2", {"--rounding"}),
         ("emomerge bake --dtype bf", "3", {"bfloat16"}), ("emomerge init movie", "2", {"movie-reviews"}),
         ("emomerge run dig", "2", {"digits", "dig"}), ("emomerge methods tall", "2", {"tall-mask"}),
         ("emomerge merge --method tie", "3", {"ties"}), ("emomerge probe --metric gau", "3", {"gaussian"})]  # fmt: skip


@pytest.mark.parametrize(("typed", "number", "wanted"), WORDS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_is_suggested(shell, typed, number, wanted, environment):
    last = {"fish": typed.split()[-1]}.get(shell, number)
    printed = said(["emomerge"], environment, _EMOMERGE_COMPLETE=f"{shell}_complete", COMP_WORDS=typed, COMP_CWORD=last)
    lines = printed.splitlines()
    found = set(lines[1::3]) if shell == "zsh" else {line.split(",", 1)[1].split("\t")[0] for line in lines if "," in line}
    assert wanted <= found
    assert all(word.startswith(typed.split()[-1]) for word in found)


SCRIPTS = {
    "bash": 'eval "$(_EMOMERGE_COMPLETE=bash_source emomerge)"; COMP_WORDS=(emomerge me); COMP_CWORD=1; '
    '_emomerge_completion emomerge; echo "${COMPREPLY[@]}"',
    "zsh": 'autoload -Uz compinit; compinit -D; eval "$(_EMOMERGE_COMPLETE=zsh_source emomerge)"; '
    "(( $+functions[_emomerge_completion] )) && COMP_WORDS='emomerge me' COMP_CWORD=1 _EMOMERGE_COMPLETE=zsh_complete emomerge",
    "fish": "_EMOMERGE_COMPLETE=fish_source emomerge | source; complete -C 'emomerge me'",
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_documented_line_in_the_shell_itself(shell, environment):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    words = said([shell, "-c", SCRIPTS[shell]], environment).split()
    assert {"merge", "methods"} <= set(words)
    assert "bake" not in words
