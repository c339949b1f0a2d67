"""Files of others: whatever is wrong with one is a single BadInput of one line, at once and in little memory."""

import json
import math
import os

import pytest
import yaml

from emomerge.errors import LONGEST, BadInput, shown
from emomerge.files import JsonObject, check_type, parse_json, parse_yaml, read_bytes, read_json_or, to_json

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def refused(call, *words):
    with pytest.raises(BadInput) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "recursion limit"),
        ('{"a": ' + "9" * 5000 + "}", "number"),
        (r'{"a": "\ud800"}', "hex escape"),
        ("", "EOF"),
        ("[1]", "should be an object"),
        (b"\xff", "JSON"),
        ("\ud800", ""),
    ],
)
def test_json_that_is_damaged_or_of_another_type(text, word):
    refused(lambda: parse_json(text, JsonObject, where="x.json"), "x.json", word)


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, [1], 2**70])
def test_json_types_are_not_converted(wrong):
    if wrong == 2**70:
        assert check_type({"a": wrong}, dict[str, int], where="x", what="w") == {"a": wrong}
    else:
        refused(lambda: parse_json(json.dumps({"a": wrong}), dict[str, int], where="x"), "x, a")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 3000 + "]" * 3000, "deep"),
        ("!!int x", "invalid literal"),
        ("!!bool x", "x"),
        ("!!float x", "float"),
        ("a: !!timestamp x", "timestamp is not supported"),
        ("!!binary eHg=", "binary is not supported"),
        ("!!set {a}", "set is not supported"),
        ("!!python/object/apply:os.getcwd []", "not supported"),
        ("9" * 5000, "4300"),
        ("a: [1", "x.yaml"),
        ('"\\0"', "NUL"),
        ('"\\ud800"', "surrogate"),
        ("? [a]\n: 1", "unhashable"),
        ("a: 1\n---\nb: 2", "another document"),
        ("x" * 1_000_001, "at most"),
    ],
)
def test_yaml_that_cannot_become_plain_data(text, word):
    refused(lambda: parse_yaml(text, what="not YAML", where="x.yaml"), "not YAML", word)


def test_dates_stay_text_and_aliases_work():
    assert parse_yaml("a: 2020-99-99\nb: &x [1, 2]\nc: *x", what="w", where="x") == {
        "a": "2020-99-99",
        "b": [1, 2],
        "c": [1, 2],
    }
    assert parse_yaml("", what="w", where="x") is None
    assert yaml.safe_load("a: 2020-01-01")["a"].year == 2020  # the library's own loader is unchanged


def test_pipes_devices_folders_and_loops_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, word in (
        (tmp_path / "pipe", "pipe"),
        (tmp_path, "folder"),
        (tmp_path / "loop", "symbolic"),
        ("/dev/zero", "device"),
    ):
        refused(lambda path=path: read_bytes(path), str(path), word)
    refused(lambda: read_bytes(tmp_path / "a\x00b"), "null")
    assert read_json_or(tmp_path / "pipe", JsonObject, {"kept": 1}) == {"kept": 1}


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert len(read_bytes(tmp_path / "large", largest=11)) == 11
    refused(lambda: read_bytes(tmp_path / "large", largest=10), "too large")


def test_written_json_holds_no_nan():
    text = to_json({"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}, "d": (1, "NaN")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": {"c": None}, "d": [1, "NaN"]}


def test_a_shown_text_has_no_effects():
    assert shown("a\x1b[31m\x9b0m\x7f\x00\n\u202e\ud800é日") == r"a\x1b[31m\x9b0m\x7f\x00\n\u202e\ud800é日"
    error = BadInput("what", where="a\x1b]0;x\x07", found="\x9b[1m" + "y" * 10_000)
    assert str(error).isprintable() and len(str(error)) < 3 * LONGEST
