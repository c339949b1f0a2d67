"""What lies beside the weights in a folder that is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import Checkpoint, MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput, EmomergeError, Note

ROWS = 8


def save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_tokenizer(folder: Path, *added: str, template: str | None = None, **state: Any) -> None:
    vocabulary = {f"w{i}": i for i in range(ROWS - 2)}
    tokens = [{"id": ROWS - 2 + i, "content": token} for i, token in enumerate(added)]
    save_json(folder / "tokenizer.json", {"model": {"vocab": vocabulary}, "added_tokens": tokens, **state})
    save_json(folder / "tokenizer_config.json", {"eos_token": "w0", **({"chat_template": template} if template else {})})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_json(folder / "config.json", {"model_type": "own", "dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}})
    save_tokenizer(folder)
    weights = {"model.embed_tokens.weight": torch.ones(ROWS, 2), "norm.weight": torch.ones(2)}
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    save_json(folder / "config.json", {})
    save_file(load_file(base / "model.safetensors"), folder / "model.safetensors")
    return folder


def written(base: Path, out: Path, *runs: Path, **options: Any) -> list[str]:
    """Write the base's weights as those of the runs; return the notes."""

    class Weights(MemoryCheckpoint):
        tokenizers_from = runs

    opened: Checkpoint = open_checkpoint(base)
    notes: list[str] = []
    write_checkpoint(Weights(dict(opened)), out, files_from=base, say=notes.append, force=True, **options)
    return notes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "base"])
def test_the_configuration_names_the_dtype_that_is_written(base: Path, tmp_path: Path, dtype: str) -> None:
    assert written(base, tmp_path / "out", dtype=dtype) == []
    stored = str(load_file(tmp_path / "out/model.safetensors")["norm.weight"].dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"model_type": "own", "dtype": stored, "text_config": {"dtype": stored}}


def test_the_older_key_of_the_dtype_follows_too_and_other_settings_do_not(base: Path, tmp_path: Path) -> None:
    config = {
        "torch_dtype": "float16", "vision_config": {"torch_dtype": "bfloat16"}, "text_config": {"hidden_act": "gelu"},
        "attention_config": {"kind": "own"}, "rope_dtype": "float16",
    }  # fmt: skip
    save_json(base / "config.json", config)
    written(base, tmp_path / "out", dtype="float32")
    expected = {**config, "torch_dtype": "float32", "vision_config": {"torch_dtype": "float32"}}
    assert json.loads((tmp_path / "out/config.json").read_text()) == expected


@pytest.mark.parametrize("nested", [False, True])
def test_plain_weights_are_not_described_as_quantized(base: Path, tmp_path: Path, nested: bool) -> None:
    quantized = {"quantization_config": {"quant_method": "gptq", "dtype": "float16", "bits": 4}}
    plain = {"model_type": "own", "dtype": "float32"}
    save_json(base / "config.json", {"text_config": {**plain, **quantized}} if nested else {**plain, **quantized})
    (line,) = written(base, tmp_path / "out", dtype="float32")
    assert "its quantization_config is left out" in line
    assert json.loads((tmp_path / "out/config.json").read_text()) == ({"text_config": plain} if nested else plain)


def test_quantized_weights_keep_their_description(base: Path, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3, dtype=torch.int8), "norm.weight": torch.ones(2)}, base / "model.safetensors")
    config = {"model_type": "own", "quantization_config": {"quant_method": "own"}}
    save_json(base / "config.json", config)
    assert written(base, tmp_path / "out") == []
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_weights_of_two_dtypes_keep_the_configuration_that_names_one_of_them(base: Path, tmp_path: Path) -> None:
    before = (base / "config.json").read_bytes()
    save_file({"a": torch.ones(2), "b": torch.ones(9).bfloat16()}, base / "model.safetensors")
    written(base, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == before


def test_files_of_any_name_are_copied(base: Path, tmp_path: Path) -> None:
    names = ["source.spm", "bpe.codes", "LICENSE", "notice.md", "norms.yaml", "additional_chat_templates/tool_use.jinja"]
    for name in names:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    assert written(base, tmp_path / "out") == []
    assert [(tmp_path / "out" / name).read_text() for name in names] == names


def test_what_is_not_copied_is_named_with_the_reason(base: Path, tmp_path: Path) -> None:
    for name in ("modeling_own.py", "tf_model.h5", "trainer_state.json", "onnx/model.onnx", ".gitattributes", "README.md"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x")
    (line,) = written(base, tmp_path / "out")
    assert line.endswith(
        ": modeling_own.py (code); onnx (folder); trainer_state.json (state of a training); tf_model.h5 (weights)"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_own.Own"}}, "modeling_own.Own"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokens.Slow", None]}}, "tokens.Slow"),
        (
            "processor_config.json",
            {"auto_map": {"AutoProcessor": "somebody/model--processing.Own"}},
            "somebody/model--processing",
        ),
        ("modules.json", [{"path": "", "type": "custom_st.Transformer"}], "custom_st.Transformer"),
    ],
)
def test_configurations_that_name_code_are_mentioned(base: Path, tmp_path: Path, file: str, content: Any, code: str) -> None:
    save_json(base / file, content)
    (line,) = written(base, tmp_path / "out")
    assert file in line
    assert code in line


def test_the_notes_are_warnings_unless_the_caller_takes_them(base: Path, tmp_path: Path) -> None:
    (base / "own.py").write_text("x")
    with pytest.warns(Note, match=r"own\.py \(code\)"):
        write_checkpoint(open_checkpoint(base), tmp_path / "out", files_from=base)


def test_the_tokenizer_of_the_runs_replaces_the_bases(base: Path, run: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text("of the base")
    (base / "tokenizer.model").write_text("vocabulary")
    save_tokenizer(run, "<tool>", template="of the run")
    (line,) = written(base, tmp_path / "out", run, run)
    assert "7 tokens" in line
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    assert (tmp_path / "out/tokenizer.model").exists()
    assert not (tmp_path / "out/chat_template.jinja").exists()  # transformers would prefer it to the run's


def test_a_chat_template_alone_is_taken_and_the_tokenizer_stays(base: Path, run: Path, tmp_path: Path) -> None:
    (run / "chat_template.jinja").write_text("of the run")
    assert len(written(base, tmp_path / "out", run)) == 1
    assert (tmp_path / "out/chat_template.jinja").read_text() == "of the run"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_was_only_saved_again_is_the_bases(base: Path, run: Path, tmp_path: Path) -> None:
    save_tokenizer(run, truncation={"max_length": 3}, padding=None)
    assert written(base, tmp_path / "out", run) == []
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("second", [(), ("<other>",), ("<tool>", "<more>")])
def test_runs_that_disagree_get_the_bases_tokenizer_and_are_named(
    base: Path, run: Path, tmp_path: Path, second: tuple[str, ...]
) -> None:
    save_tokenizer(run, "<tool>")
    other = tmp_path / "other"
    save_json(other / "config.json", {})
    save_tokenizer(other, *second, template="its own")
    (line,) = written(base, tmp_path / "out", run, other)
    assert str(run) in line
    assert str(other) in line
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_files_beside_a_loose_run_are_not_its_tokenizer(base: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    save_json(loose / "vocab.json", {"a": 0})
    assert written(base, tmp_path / "out", loose) == []


@pytest.mark.parametrize("added", [2, 3])
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(base: Path, run: Path, tmp_path: Path, added: int) -> None:
    save_tokenizer(run, *(f"<{i}>" for i in range(added)))
    lines = written(base, tmp_path / "out", run)
    assert any(f"ids up to {ROWS}, but model.embed_tokens.weight has {ROWS} rows" in line for line in lines) == (added == 3)


def test_a_damaged_companion_is_copied_as_it_is(base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text("{")
    (base / "tokenizer.json").write_text("[]")
    assert written(base, tmp_path / "out") == []
    assert (tmp_path / "out/config.json").read_text() == "{"


def test_a_folder_that_does_not_hold_what_was_written_is_not_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emomerge.checkpoints.writer._stored", lambda info, dtype: info._replace(dtype=torch.float32))
    real = open_checkpoint

    def lying(path: Path) -> Checkpoint:
        return MemoryCheckpoint({name: tensor.half() for name, tensor in real(path).items()})

    monkeypatch.setattr("emomerge.checkpoints.writer.open_checkpoint", lying)
    with pytest.raises(EmomergeError, match="would not hold"):
        write_checkpoint(real(base), tmp_path / "out", files_from=base)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sentences(base: Path) -> Path:
    """A sentence-transformers folder: the transformer in the folder itself, a pooling and a dense layer below."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    save_json(base / "modules.json", [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules])
    save_json(base / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    save_json(base / "2_Dense/config.json", {"in_features": 2, "out_features": 3})
    save_file({"linear.weight": torch.ones(3, 2)}, base / "2_Dense/model.safetensors")
    return base


def test_the_modules_of_sentence_transformers_are_parts(sentences: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(sentences)
    assert opened.names() == ("2_Dense/linear.weight", "model.embed_tokens.weight", "norm.weight")
    moved = MemoryCheckpoint({name: tensor + 1 for name, tensor in opened.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_checkpoint(moved, tmp_path / "out", files_from=sentences)
    assert torch.equal(load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"], torch.full((3, 2), 2.0))
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"model.embed_tokens.weight", "norm.weight"}
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sentences / name).read_bytes()


def test_a_dense_layer_that_is_a_pickle_is_copied_unchanged(sentences: Path, tmp_path: Path) -> None:
    (sentences / "2_Dense/model.safetensors").rename(sentences / "2_Dense/pytorch_model.bin")
    (line,) = written(sentences, tmp_path / "out")
    assert "unchanged" in line
    assert "2_Dense/pytorch_model.bin" in line
    assert (tmp_path / "out/2_Dense/pytorch_model.bin").read_bytes() == (sentences / "2_Dense/pytorch_model.bin").read_bytes()


@pytest.mark.parametrize("path", ["..", ".", "/", "1_Pooling/.."])
def test_a_module_elsewhere_is_no_part(sentences: Path, path: str) -> None:
    save_json(sentences / "modules.json", [{"path": path, "type": "sentence_transformers.models.Dense"}])
    assert open_checkpoint(sentences).names() == ("model.embed_tokens.weight", "norm.weight")


def test_a_damaged_list_of_modules_is_refused(sentences: Path) -> None:
    (sentences / "modules.json").write_text("{}")
    with pytest.raises(BadInput, match=r"modules\.json; found Input should be a valid array"):
        open_checkpoint(sentences)
