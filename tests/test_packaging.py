"""The metadata, the README and the public names say the same."""

import re
import tomllib
from pathlib import Path

import pytest

import emomerge
from emomerge.extras import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def test_the_core_has_seven_dependencies():
    names = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    assert names == {"torch", "safetensors", "numpy", "click", "pydantic", "PyYAML", "rich"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_what_its_error_asks_for(extra):
    declared = {distribution(requirement) for requirement in OPTIONAL[extra]} - {"emomerge"}
    assert declared == set(EXTRAS[extra].values())


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_documents_name_extras_that_exist(file):
    named = re.findall(r"(?:emomerge|'\.)\[([a-z,]+)\]", (ROOT / file).read_text())
    assert named
    assert {extra for group in named for extra in group.split(",")} <= OPTIONAL.keys()


def test_extras_refer_to_extras_that_exist():
    named = re.findall(r"emomerge\[([a-z,]+)\]", str(OPTIONAL))
    assert {extra for group in named for extra in group.split(",")} <= OPTIONAL.keys()


def test_the_version_is_that_of_the_metadata_and_of_the_citation():
    assert emomerge.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_exports_these_names():
    assert set(emomerge.__all__) <= set(dir(emomerge))
    assert issubclass(emomerge.MissingExtra, emomerge.EmomergeError)
    assert emomerge.merge_method.__module__.startswith("emomerge.merging")
