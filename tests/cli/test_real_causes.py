"""A command that cannot do its work names the real cause at once, in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import save_file

from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.progress import Display
from emomerge.tasks.rows import read_rows

W = torch.ones(2, 2)
CODES = torch.ones(2, 2, dtype=torch.int32)
QUANTIZED = {
    "GPTQ": {"a.qweight": CODES, "a.qzeros": CODES, "a.scales": W.half(), "a.g_idx": CODES},
    "AWQ": {"a.qweight": CODES, "a.qzeros": CODES, "a.scales": W.half()},
    "bitsandbytes, 4 bits": {"a.weight": CODES.byte(), "a.weight.quant_state.bitsandbytes__nf4": CODES.byte()},
    "bitsandbytes, 8 bits": {"a.weight": CODES.to(torch.int8), "a.SCB": W},
    "FP8 with scales": {"a.weight": W.to(torch.float8_e4m3fn), "a.weight_scale_inv": W},
    "compressed-tensors": {"a.weight_packed": CODES, "a.weight_scale": W},
    "MXFP4": {"a.experts_blocks": CODES.byte(), "a.experts_scales": CODES.byte()},
}


def model(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def adapter(folder: Path) -> str:
    folder.mkdir()
    config: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
    save_file({f"base_model.model.a.{n}.weight": t for n, t in names.items()}, folder / "adapter_model.safetensors")
    return str(folder)


def fails(*arguments: object) -> str:
    """Return the message of a command that ends with exit status 2 and one line."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_bases_are_named(tmp_path: Path, kind: str) -> None:
    quantized, whole = model(tmp_path / "quantized", QUANTIZED[kind]), model(tmp_path / "whole", {"a.weight": W})
    for arguments in (
        ("bake", quantized, adapter(tmp_path / "adapter")), ("merge", quantized, whole, "--method", "mean"),
        ("merge", whole, quantized, "--method", "mean"),
    ):  # fmt: skip
        message = fails(*arguments, "-o", tmp_path / "out")
        assert f"the model is quantized ({kind})" in message
        assert "give the model in safetensors that it was quantized from" in message
    shown = CliRunner().invoke(main, ["inspect", quantized, "--json"])
    assert json.loads(shown.stdout)["quantized"] == kind


@pytest.mark.parametrize("place", ["model.gguf", "folder"])
def test_gguf_files_are_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "model.gguf", tmp_path / "folder/model.gguf"):
        file.write_bytes(b"GGUF" + bytes(60))
    for command in (["inspect"], ["bake", "-o", tmp_path / "out", "adapter"], ["merge", "-o", tmp_path / "out"]):
        arguments = [*command[:1], tmp_path / place, *command[3:], *command[1:3], *(["run"] if command[0] == "merge" else [])]
        assert "a GGUF file" in fails(*arguments)


def test_integer_weights_that_are_no_codes_are_a_model(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"a.weight": W, "steps": CODES})
    result = CliRunner().invoke(main, ["merge", base, base, "--method", "mean", "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output


def test_exchanged_arguments_are_named(tmp_path: Path) -> None:
    base, lora = model(tmp_path / "base", {"a.weight": W}), adapter(tmp_path / "adapter")
    message = fails("bake", lora, base, "-o", tmp_path / "out")
    assert "the base comes first" in message
    assert message.endswith(f"exchange them: {base} {lora}")
    assert "name its base first" in fails("merge", lora, base, "-o", tmp_path / "out")


def test_a_mistyped_folder_is_asked_of_the_hub_once_and_its_neighbour_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def ask(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "my-base", {"a.weight": W})
    message = fails("merge", "my-bsae", "run", "-o", "out")
    assert asked == ["my-bsae"]
    assert message.endswith("did you mean my-base?")
    assert fails("bake", "./my-bsae", "run", "-o", "out").endswith("did you mean my-base?")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_that_stores_nothing_is_no_full_disk(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"a.weight": W})
    for out in ("/proc/out", "/proc/out.safetensors", "/sys/out"):
        message = fails("merge", base, base, "--method", "mean", "-o", out)
        assert "not a disk" in message
        assert "full" not in message


@pytest.mark.parametrize(
    ("name", "content"), [("a.tsv", ""), ("a.csv", ""), ("a.jsonl", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n")]
)
def test_empty_data_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match="the data file (is empty|has no rows)"):
        read_rows(str(tmp_path / name), "train", ["text", "label"])


@pytest.mark.parametrize("done", [0, 1])
def test_no_spinner_stays_above_an_error(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = Display(), io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=screen, force_terminal=True, width=100))
    with pytest.raises(BadInput), display.live():
        display.line("finished", 1).at(1)
        display.line("at work", 3).add(done)
        raise BadInput("no")
    last = screen.getvalue().rpartition("\x1b[2K")[2]
    assert not any(spinner in last for spinner in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
    assert ("✗" in last) == ("at work" in last) == bool(done)
    assert "finished" in screen.getvalue()
