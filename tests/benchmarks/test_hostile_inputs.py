"""The short form of the campaign: a few damaged files for every reader, and some of the odd tensors for every merge method."""

import importlib
import random
from pathlib import Path

import pytest
import torch

from emomerge.errors import BadInput
from emomerge.merging import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRIALS = {
    "page": 1,
    "model of a configuration": 4,
    "output folder": 8,
    "recipe": 25,
    "settings of a recipe": 15,
    "record of a merge": 20,
}


@pytest.fixture(scope="module")
def hostile():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("hostile_inputs")


@pytest.fixture(scope="module")
def damaging(hostile):
    return importlib.import_module("hostile_damage")


@pytest.fixture(scope="module")
def readers(hostile):
    torch.set_num_threads(1)
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    return hostile.readers()


NAMES = [
    "one file", "sharded folder", "folder of parts", "configuration and tokenizer", "adapter", "adapter configuration",
    "model of a configuration", "recipe", "settings of a recipe", "mergekit configuration", "record of a merge", "masks",
    "output folder", "results", "page", "data tables", "image data", *(f"command line {i}" for i in range(1, 7)),
    *(f"image adapter, {kind}" for kind in (
        "LoRA, fused", "LoRA, split", "LoRA of a convolution", "DoRA", "LoHa", "LoKr", "GLoRA", "IA3", "OFT", "BOFT",
        "differences", "XLabs",
    )),
    *(f"PEFT, {kind}" for kind in (
        "AdaLoRA", "BOFT", "DoRA", "FourierFT", "HRA", "IA3", "LoHa", "LoKr", "MiSS", "OFT", "RandLoRA", "VeRA",
    )),
    "FP8 base", "GGUF base",
]  # fmt: skip


def test_every_reader_is_among_them(readers):
    assert sorted(readers) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"page"}))  # whose figures take seconds
def test_damaged_inputs_end_in_success_or_one_line(damaging, readers, name, tmp_path):
    reader = readers[name]
    for file, data in reader.files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(data)
    reader.read(tmp_path)  # the sample itself is sound
    trials = TRIALS.get(name, 6 if name.startswith("command") else 10 if ", " in name else 40)
    outcome = damaging.campaign(name, damaging.Reader(reader.files, reader.read, 1.0, reader.folder_kinds), 1, trials)
    assert outcome.failures == {}
    assert outcome.trials == outcome.accepted + outcome.refused == trials


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_odd_tensors(hostile, method):
    outcome = hostile.method_trials(methods={method: METHODS[method]}, counts=(13,), unmoved=(False,))
    assert outcome.failures == {}


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: print("\x1b[31m"), "shows"),
        (lambda folder: (folder / "x.tmp").touch(), "left x.tmp"),
        (lambda folder: _refuse(folder), "a message with"),
    ],
)
def test_the_campaign_notices_failures(damaging, read, kind):
    outcome = damaging.campaign("x", damaging.Reader({"a.json": b"{}"}, read, folder_kinds=False), 0, 1)
    assert [failure[: len(kind)] for failure in outcome.failures] == [kind]


def _refuse(folder):
    error = BadInput("what")
    error.args = ("two\nlines",)
    raise error


def test_a_trial_depends_on_its_number_alone(damaging):
    def drawn(number):
        return damaging.damaged_file("a.json", b'{"a": [1, 2, {"b": "c"}]}', random.Random(f"0 x {number}"))

    assert [drawn(i) for i in range(50)] == [drawn(i) for i in range(50)]
    assert len({drawn(i) for i in range(50)}) > 30
