"""Results and checkpoints in notebooks: complete, escaped, and without colours of their own."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import torch
from safetensors.torch import save_file

import emomerge
from emomerge.checkpoints import MemoryCheckpoint


class Balanced(HTMLParser):
    """Collects the text, and fails if an element is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    assert not re.search(r"#[0-9a-f]{3}|rgb\(|(white|black)\b", html), "the page decides the colours"
    return " ".join(parser.text)


def test_results_show_the_advice_and_the_table(results):
    text = text_of(results._repr_html_())
    assert results.selected.sentence in text and results.verdict.sentence in text
    for row in results.artefacts:
        assert row.name in text
    assert f"{results.artefacts[1].mean('test_loss'):.4f}" in text
    assert text.index(results.selected.sentence) < text.index(results.artefacts[1].name + " ")
    assert "★" in text


def test_names_are_escaped(results):
    nasty = results.artefacts[1].model_copy(update={"name": "<script>alert(1)</script>\x1b[31m"})
    html = results.model_copy(update={"artefacts": (nasty, *results.artefacts[2:])})._repr_html_()
    assert "<script" not in html and "\x1b" not in html and "&lt;script&gt;" in html


def test_empty_results_show_their_name(results):
    assert "bare" in text_of(type(results)(name="bare")._repr_html_())


def test_checkpoints_show_what_they_are(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(
        {"layer.weight": torch.zeros(6, 4), "norm": torch.zeros(6, dtype=torch.bfloat16)}, tmp_path / "base/model.safetensors"
    )
    base = emomerge.open_checkpoint(tmp_path / "base")
    text = text_of(base._repr_html_())
    for part in (str(tmp_path / "base"), "one safetensors file", "30", "1 × float32", "1 × bfloat16"):
        assert part in text
    (tmp_path / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(2, 4), "B": torch.ones(6, 2)}
    factors = {f"base_model.model.layer.lora_{part}.weight": tensor for part, tensor in factors.items()}
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    text = text_of(emomerge.bake(base, tmp_path / "lora")._repr_html_())
    for part in (str(tmp_path / "lora"), "computed on demand", "1 of 2 tensors"):
        assert part in text
    assert "1 of 2" not in text_of(MemoryCheckpoint({"w": torch.zeros(3)})._repr_html_())
