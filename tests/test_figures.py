"""README and documentation: every measured figure is written by a script in benchmarks/, from what it has stored.

Looked through are all pages except those that a script writes as a whole, without their code and without the parts between
`<!-- written by … -->` and `<!-- end … -->`. What looks like a measurement there, a number with a unit, a ratio or a decimal
number, has to be in `NOT_MEASURED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:%|×|ms|s|min|h|[kKMGT]i?B|times|fold|percent|(?:CPU )?(?:milli)?seconds?|minutes?|hours?)(?![\w×])"
WORD = r"(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|a hundred|a thousand)"
COMPARED = "(?:less|more|fewer|lower|higher|faster|slower|smaller|larger|shorter|longer)"
FIGURE = re.compile(
    rf"(?<![\w.,^/]){NUMBER}(?:(?:,| to| or| and|–| …) ?{NUMBER})*[ \u00a0-]?{UNIT}"  # 1.3 ×, 5 %, 8.5, 9.1 and 11.3 ms
    r"|(?<![\w.,^/])\d[\d,]*\.\d+(?!\.?\w)"  # 0.44
    rf"|\b{WORD} (?:percent|(?:CPU )?seconds|minutes|hours|times (?:the|that|as (?:much|long|fast)|{COMPARED}))\b"
    rf"|\b(?:half|a third|a quarter|a tenth) {COMPARED}\b"  # it takes a quarter less
)
NOT_MEASURED = {
    "README.md": {"Apache-2.0": "a name"},
    "docs/adapters.md": {
        "Wan 2.1 14B": "a name",
        "2.2 is two such models": "a name",
        "PEFT 0.14": "a version",
    },
    "docs/explanation/emopulse.md": {
        "factors of 0.01 to 100": "the range that was measured over",
        "0.12": "a constant of the preset",
    },
    "docs/explanation/paper.md": {
        "factors of 0.01 to 100": "the range that was measured over",
        "below a loss of 0.30": "the claim",
    },
    "docs/explanation/procedure.md": {
        "up to 30 times": "a setting",
        "of 0.1, 0.2, …, 1.5": "settings",
        "0.7 to 0.9": "settings",
    },
    "docs/explanation/report.md": {"95 % probability": "the level of the intervals"},
    "docs/guides/optimizers.md": {"≤ 0.3": "follows from the update rule, and tests/optim counts it"},
    "docs/performance.md": {
        "1.5 times the memory": "a setting",
        "factor of 1.15": "a setting",
        "density 0.2": "a setting",
    },
    "docs/sdxl.md": {"captures 90 %": "a setting"},
}
"""Page → a phrase with a number that nobody measured → what it is instead."""
WHOLE = re.compile(r"All of this (?:page|file) is written by `")
GENERATED = re.compile(r"<!-- written by .*?<!-- end.*?-->", re.DOTALL)
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`|\]\([^)\s]*\)", re.DOTALL | re.MULTILINE)
"""Blocks, spans, and targets of links."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def typed(text: str) -> str:
    """What a person has typed on a page: nothing, if a script writes all of it."""
    return "" if WHOLE.search(text[:600]) else CODE.sub("", GENERATED.sub("", text))


def figures(text: str, known: Iterable[str] = ()) -> Iterator[str]:
    """The typed figures of a page outside some known phrases, each with what stands around it."""
    text = re.sub(r"\s+", " ", typed(text))
    for phrase in known:
        text = text.replace(phrase, "(…)")
    for found in FIGURE.finditer(text):
        yield text[max(0, found.start() - 30) : found.end() + 30]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_measured_figure_is_typed(page: Path) -> None:
    assert list(figures(page.read_text(encoding="utf-8"), NOT_MEASURED.get(name_of(page), {}))) == []


def test_every_exception_is_needed() -> None:
    for name, known in NOT_MEASURED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for phrase in known:
            assert list(figures(text, known.keys() - {phrase})) != [], f"{name}: {phrase}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_written_part_names_its_script_and_ends(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"<!-- (?:written by ([\w/.]+).*?|end.*?) -->", text)
    assert [bool(script) for script in parts] == [True, False] * (len(parts) // 2)
    assert [script for script in parts if script and not (ROOT / script).is_file()] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 12 s.",
        "It takes 85 CPU seconds on two cores.",
        "Memory grows by 0.4 GB, or 256 MiB.",
        "That is 1.3 × the model, and not 3.",
        "It runs at 1.8 to 5.1 times AdamW's speed.",
        "The mean is 6 to 9 % off.",
        "The loss falls to 0.35.",
        "| | loss | time |\n|---|---:|---:|\n| a | **0.44** | |",
        "| | time |\n|---|---:|\n| b | 3 s |",
        "It is thirty\ntimes faster.",
        "It takes a quarter less memory.",
    ],
)
def test_a_typed_figure_is_found(sentence: str) -> None:
    assert len(list(figures(f"# Page\n\n{sentence}\n"))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "Rank 16 of 794 layers in v3.8, torch==2.13.0, 10⁻⁵, bfloat16, five runs of 200 steps.",
        "`--density 0.2` and [a link](page-0.5.md)",
        "```text\n0.5 s\n```",
        "<!-- written by benchmarks/x.py: y -->\n\n0.5 s\n\n<!-- end of y -->",
        "All of this page is written by `benchmarks/x.py`.\n\n0.5 s",
    ],
)
def test_what_is_no_typed_figure_is_left_alone(text: str) -> None:
    assert list(figures(f"# Page\n\n{text}\n")) == []
