"""Patterns of adapter configurations: Python's answers, in linear time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emomerge.adapters.peft.patterns import matches_end
from emomerge.errors import BadInput

NAMES = ["model.layers.3.q_proj", "q_proj", "model.layers.10.self_attn.q_proj", "aaaa", "q_projx", "model.layers.3.k_proj", ""]
PATTERNS = [
    "q_proj", r"^model\.layers\.3\.q_proj", "model.layers.3.*", "(q|k)_proj", ".*q_proj$", r"layers\.(?:[0-9]+)\..*", "[^.]*",
    "a{2,4}", "a?a?a?a", "(?:a|aa)+", r"\bq_proj\b", r"layers\.1\d\..+?proj", r"\w+", "",
    r"layers\.(3|4)\.(q|v)_proj", r"[a-z_]+\d*",
]  # fmt: skip


def peft(pattern, name):
    """`peft.utils.get_pattern_key` for one pattern."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_peft_matches_them(pattern):
    for name in NAMES:
        assert matches_end(pattern, name, where="x") == peft(pattern, name), name


@given(st.text("ab.*+?|()[]^$\\d{1,2}-", max_size=10), st.text("ab.1-", max_size=8))
def test_any_pattern_matches_as_in_python_or_is_refused(pattern, name):
    try:
        re.compile(pattern)
    except re.error:
        with pytest.raises(BadInput):
            matches_end(pattern, name, where="x")
        return
    try:
        found = matches_end(pattern, name, where="x")
    except BadInput:  # a back-reference, or a warning that Python will turn into an error
        return
    assert found == peft(pattern, name)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+$x", ".*" * 20 + "x", "a?" * 60 + "b", "((a{1,9}){1,9}){1,9}b"]
)
def test_no_pattern_takes_long(pattern):
    began = time.process_time()
    assert not matches_end(pattern, "a" * 60, where="x")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "pattern", ["(", "[", r"(a)\1", "(?=a)", "(?i)a", "a{100000}", "((a{1,60}){1,60}){1,60}", "(?(1)a)", "(" * 3000]
)
def test_what_is_not_supported_is_named(pattern):
    with pytest.raises(BadInput, match=r"a pattern that is not supported: config, rank_pattern; found"):
        matches_end(pattern, "a", where="config, rank_pattern")
