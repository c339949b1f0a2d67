"""`emomerge init --from DATA` guesses the task and its columns, shows them, and writes a recipe that loads."""

import json

import pytest
import yaml
from click.testing import CliRunner

from emomerge.cli import main
from emomerge.recipe import load_recipe

WORDS = ["a", "quiet", "and", "generous", "film", "about", "a", "lighthouse"]


def call(*args):
    return CliRunner().invoke(main, ["init", *map(str, args)])


def written(data, *more):
    """The recipe that is written beside the data, and what was printed."""
    out = data.parent / "mine.yaml"
    result = call("--from", data, "-o", out, *more)
    assert result.exit_code == 0, result.output
    recipe = load_recipe(out, [])
    assert str(data) in recipe.external_sources(), "found from anywhere"
    return yaml.safe_load(out.read_text()), result.output


def sentence(number):
    return " ".join(WORDS[: 3 + number % 5]) + f" {number}"


@pytest.mark.parametrize(
    ("ending", "header", "columns"),
    [("tsv", "label\ttext", {"text": "text", "label": "label"}), ("tsv", None, {"text": 1, "label": 0}),
     ("csv", "verdict,Utterance", {"text": "Utterance", "label": "verdict"})],
)  # fmt: skip
def test_a_table_of_texts_and_labels(tmp_path, ending, header, columns):
    data, comma = tmp_path / f"reviews.{ending}", "\t" if ending == "tsv" else ","
    lines = [comma.join(("good" if n % 3 else "bad", sentence(n))) for n in range(90)]
    data.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    recipe, printed = written(data)
    assert recipe["task"] == {
        "kind": "text-classification", "train": data.name, "columns": columns, "max_length": 16, "eval_fraction": 0.5
    }  # fmt: skip
    assert "90 rows, taken for text-classification" in printed
    assert "good 60, bad 30" in printed
    assert recipe["runs"]["steps"] == 40
    assert "# " + f"  {columns['label']}: good 60, bad 30" in (tmp_path / "mine.yaml").read_text()


def test_ratings_are_cut_at_their_median(tmp_path):
    data = tmp_path / "ratings.tsv"
    data.write_text("".join(f"{n}\t{n / 7 - 5:.3f}\t{sentence(n)}\n" for n in range(80)))
    recipe, printed = written(data)
    assert recipe["task"]["columns"] == {"text": 2, "label": 1}
    assert list(recipe["task"]["classes"]) == ["low", "high"]
    low, high = recipe["task"]["classes"].values()
    assert low.startswith("< ") and high == low.replace("<", ">=")
    assert "cut at the median" in printed


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (lambda n: {"messages": CHAT}, {"messages": "messages"}),
        (lambda n: {"question": f"{n}?", "answer": sentence(n), "id": n}, {"prompt": "question", "completion": "answer"}),
        (lambda n: {"id": str(n), "note": sentence(n)}, {"text": "note"}),
    ],
    ids=["chats", "prompts", "texts"],
)
def test_json_lines_for_a_language_model(tmp_path, row, columns):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(n)) + "\n" for n in range(60)))
    recipe, _ = written(data, "--base", "some/model")
    assert (recipe["task"]["kind"], recipe["task"]["columns"]) == ("causal-lm", columns)
    assert recipe["base"]["model"] == "some/model"


def test_folders_of_images_and_of_texts(tmp_path):
    for name in ("rose", "tulip"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "flowers" / name / f"{number}.png").write_bytes(b"")
    recipe, printed = written(tmp_path / "flowers")
    assert recipe["task"]["kind"] == "image-classification" and "rose 4, tulip 4" in printed
    (tmp_path / "notes").mkdir()
    for number in range(5):
        (tmp_path / "notes" / f"{number}.md").write_text(sentence(number) * 30)
    (tmp_path / "mine.yaml").unlink()
    recipe, printed = written(tmp_path / "notes")
    assert recipe["task"]["kind"] == "causal-lm" and "5 rows" in printed


def test_data_elsewhere_are_named_by_their_whole_path(tmp_path):
    (tmp_path / "data").mkdir()
    data, out = tmp_path / "data" / "a.txt", tmp_path / "recipes" / "a.yaml"
    data.write_text("\n\n".join(sentence(n) for n in range(20)))
    out.parent.mkdir()
    assert call("--from", data, "-o", out).exit_code == 0
    assert yaml.safe_load(out.read_text())["task"]["train"] == str(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "no rows"),
        ("a.tsv", b"text\tlabel\n", "no rows"),
        ("a.csv", b"1,2\n3,4\n", "no column with text"),
        ("a.csv", b'"a,b\n', "cannot be read"),
        ("a.tsv", b"\xff\xfe\tx\n", "cannot be read"),
        ("a.jsonl", b"[1]\n", "not a JSON object"),
        ("a.jsonl", b"\xff\n", "not UTF-8"),
        ("a.bin", b"x", "not data that a task reads"),
        ("a.txt", b"", "no text"),
    ],
)
def test_what_is_no_data_is_one_line_and_nothing_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    result = call("--from", tmp_path / name, "-o", tmp_path / "out.yaml")
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.yaml").exists()


def test_wrong_uses(tmp_path):
    assert "no such data" in call("--from", tmp_path / "none", "-o", tmp_path / "o.yaml").output
    (tmp_path / "empty").mkdir()
    assert "neither images in folders nor texts" in call("--from", tmp_path / "empty", "-o", tmp_path / "o.yaml").output
    assert "not both" in call("digits", "--from", tmp_path / "empty").output
    assert "--base goes with --from" in call("digits", "--base", "x", "-o", tmp_path / "o.yaml").output
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "o.yaml").write_text("mine")
    assert "already exists" in call("--from", tmp_path / "a.txt", "-o", tmp_path / "o.yaml").output
    assert (tmp_path / "o.yaml").read_text() == "mine"
