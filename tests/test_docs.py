"""README and documentation: links lead somewhere, and blocks of commands, Python and YAML work as printed.

Blocks of a page run in their order, in one folder and one Python namespace. Trainings are cut short by `--set`. Not run are
commands that install packages or need a cluster (`ELSEWHERE`); Python that needs a model of the Hub is compiled only
(`PYTHON_ELSEWHERE`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from emomerge.cli import main
from emomerge.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("pip install", "torchrun", "apt-get", "accelerate", "python benchmarks", "git ", "--executor", "--max-parallel")
"""Parts of command lines that are not run: they install packages, need a cluster, or take hours."""
SHORT = {
    "runs.steps": 4, "runs.batch_size": 4, "task.limit": 60, "base.prepare.steps": 2, "probe.preset": "quick",
    "probe.batches": 1, "probe.batch_size": 8, "probe.directions": 2, "controls": "[best-single]",
}  # fmt: skip


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[2], found[3])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


ALL = [block for page in PAGES for block in blocks(page)]


def test_the_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_block_says_what_it_is():
    assert {block.language for block in ALL} <= {"console", "python", "yaml", "text", "diff"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        drawn = file.parent.name == "gallery" and file.suffix == ".html"  # by the build, from stored results
        assert file.is_file() or drawn, f"{target} in {name_of(page)}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            named = [re.search(r"\{ *#([\w-]+) *\}$", title) for title in titles]
            plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in [*plain, *(name[1] for name in named if name)], target


def test_the_gallery_is_of_results_that_this_version_reads():
    sys.path.append(str(ROOT / "benchmarks"))
    import gallery

    from emomerge.reporting.comparison import compare

    found = compare({name: gallery.stored(name) for name in gallery.COMPARED})
    assert found.groups[0].runs == gallery.COMPARED
    for name in (*gallery.COMMANDS, gallery.COMPARISON):
        assert name == gallery.COMPARISON or gallery.stored(name).name
        for scheme in ("light", "dark"):
            assert (gallery.GALLERY / f"{name}-{scheme}.png").read_bytes().startswith(b"\x89PNG")


def test_most_of_the_blocks_are_executed(capsys):
    """Executed: Python that runs, YAML that is parsed as a recipe or configuration, and console blocks of which a line runs."""
    shown = [block for block in ALL if block.language in ("console", "python", "yaml")]
    run = [block for block in shown if is_executed(block)]
    with capsys.disabled():
        print(f"\n{len(run)} of {len(shown)} blocks of README and documentation are executed")
    assert len(run) >= 0.8 * len(shown), [f"{name_of(b.page)}, line {b.line}" for b in shown if b not in run]


def is_executed(block: Block) -> bool:
    if block.language == "console":
        return any(map(is_run_here, command_lines(block)))
    return PYTHON_ELSEWHERE.get(block.page.name, "\0") not in block.text


def command_lines(block: Block) -> list[str]:
    """The commands of a block without comments and continuations."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = (re.split(r"\s{2,}#|^#", line)[0].strip() for line in joined.splitlines())
    return [part.strip() for line in lines if line for part in line.split("&&")]


def is_run_here(line: str) -> bool:
    return not any(part in line for part in ELSEWHERE) and line not in ("pytest", "mkdocs serve", "mkdocs build --strict")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """What `emomerge run digits` leaves; several pages begin with this command, which then finds nothing to do."""
    out = tmp_path_factory.mktemp("digits")
    with contextlib.chdir(out):
        run_command("emomerge run digits")
    return out / "out/digits"


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    """A folder with what the pages take for granted: a base, adapters, the recipes, and files of labelled sentences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(digits, tmp_path / "out/digits")
    shutil.copytree(digits, tmp_path / "out/other-seed")
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"layer.weight": torch.randn(8, 4, generator=generator)}, tmp_path / "base/model.safetensors")
    for name in ("runs/sens-0", "runs/cats-0", "run-c"):
        (tmp_path / name).mkdir(parents=True)
        factors = {"A": torch.randn(2, 4, generator=generator), "B": torch.randn(8, 2, generator=generator)}
        factors = {f"base_model.model.layer.lora_{part}.weight": tensor for part, tensor in factors.items()}
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    rows = [(f"{n}{word}", rating, f"the {word} film", label) for n in range(40) for word, rating, label in
            (("fine", 2.0, "good"), ("dull", -2.0, "bad"))]  # fmt: skip
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for *_, text, label in rows))
    snippets = "".join(f"{key}\t{rating}\t{text}\n" for key, rating, text, _ in rows)
    (tmp_path / "movieReviewSnippets.tsv").write_text(snippets)
    return tmp_path


def run_command(line: str, tiny_bert: Path | None = None) -> None:
    args = shlex.split(line)[1:]
    if args[0] in ("run", "train-all", "probe"):
        recipe = yaml.safe_load(find_recipe(args[1]).read_text(encoding="utf-8"))
        base, task = recipe.get("base", {}), recipe["task"]
        fitting = {key: value for key, value in SHORT.items() if "prepare" in base or not key.startswith("base.prepare")}
        if task["kind"] == "custom":
            del fitting["task.limit"]
        if base.get("model", "").startswith("sentence-transformers/"):
            fitting |= {"base.model": tiny_bert, "task.max_length": 16}
        args += [part for key, value in fitting.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, f"{line}\n{result.output}"


def find_recipe(name: str) -> Path:
    return Path(name) if Path(name).is_file() else ROOT / "recipes" / f"{name}.yaml"


class Model(torch.nn.Module):
    """What README's loop trains: a model that returns an object with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return type("Output", (), {"loss": self.layer(x).square().mean()})


def namespace(page: Path) -> dict[str, Any]:
    """The variables that a page's Python takes for granted."""
    given: dict[str, Any] = {}
    if page.name == "README.md":
        given = {"model": Model(), "batches": [{"x": torch.randn(3, 4)} for _ in range(3)]}
    return given


PYTHON_ELSEWHERE = {"optimizers.md": "EmoTrainer(", "tutorial.md": "AutoModelForSequenceClassification"}
"""Page → a part of the block that needs a model of transformers; tests/integrations and tests/experiment load such ones."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_the_blocks_of_a_page_work(page, folder, tiny_bert):
    names = namespace(page)
    for block in blocks(page):
        where = f"{name_of(page)}, line {block.line}"
        if block.language == "python":
            first = block.text.partition("\n")[0]
            if first.startswith("# ") and first.endswith(".py"):
                Path(first[2:]).write_text(block.text)
            if PYTHON_ELSEWHERE.get(page.name, "\0") in block.text:
                compile(block.text, where, "exec")
                continue
            exec(compile("\n" * block.line + block.text, where, "exec"), names)
        elif block.language == "yaml":
            data = yaml.safe_load(block.text)
            if "name" in data and "task" in data:
                Path(f"{data['name']}.yaml").write_text(block.text)
            if "task" in data and "kind" in data["task"]:
                parse_recipe({"name": "x", "base": {"model": "some/model"}, **data})
        elif block.language == "console":
            for line in command_lines(block):
                if is_run_here(line):
                    assert line.startswith("emomerge "), f"{where}: {line}"
                    run_command(line, tiny_bert)


def test_the_schema_accepts_the_shipped_recipes_and_the_documented_ones():
    from emomerge.merging import METHODS
    from emomerge.recipe.schema import recipe_schema

    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(recipe_schema(METHODS))
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        checker.validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    bad = yaml.safe_load((ROOT / "recipes/digits.yaml").read_text(encoding="utf-8"))
    bad["runs"]["stepss"] = 3
    assert [error.validator for error in checker.iter_errors(bad)] == ["additionalProperties"]
    shown = json.dumps(checker.schema)
    assert "Share of all runs' steps that one run of the first optimizer takes" in shown
