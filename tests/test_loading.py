"""What bake and merge write loads in transformers by its folder alone, and computes what it should, for many architectures."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emomerge.cli import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

T: Any = transformers
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1}
IDS = {"input_ids": torch.arange(12).view(2, 6) + 3}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


class Kind(NamedTuple):
    """An architecture: how a tiny model of it is made, the Auto class that loads it, its inputs, and modules for LoRA."""

    make: Callable[[], nn.Module]
    auto: str
    inputs: dict[str, Tensor]
    targets: list[str]


def llama(**options: Any) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, **options))


def qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**GROUPED, **experts))


def llava() -> nn.Module:
    vision = T.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                                patch_size=8, projection_dim=16)  # fmt: skip
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**GROUPED), image_token_index=60)
    )


def resnet() -> nn.Module:
    config = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return T.ResNetForImageClassification(config)


def vit() -> nn.Module:
    config = T.ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                         patch_size=8, num_labels=3)  # fmt: skip
    return T.ViTForImageClassification(config)


LLAVA_INPUTS = {"input_ids": torch.tensor([[1, 60, 60, 60, 60, 5]] * 2), **PIXELS}
T5_INPUTS = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]}
KINDS = {
    "llama": Kind(llama, "AutoModelForCausalLM", IDS, ["q_proj", "down_proj"]),
    "tied llama": Kind(lambda: llama(tie_word_embeddings=True), "AutoModelForCausalLM", IDS, ["q_proj", "down_proj"]),
    "qwen2": Kind(lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)), "AutoModelForCausalLM", IDS, ["v_proj", "up_proj"]),
    "qwen3-moe": Kind(qwen3_moe, "AutoModelForCausalLM", IDS, ["q_proj", "o_proj"]),
    "gemma3": Kind(
        lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, head_dim=8)),
        "AutoModelForCausalLM", IDS, ["k_proj", "up_proj"],
    ),
    "llava": Kind(llava, "AutoModelForImageTextToText", LLAVA_INPUTS, ["q_proj", "linear_1"]),
    "gpt2": Kind(
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
        "AutoModelForCausalLM", IDS, ["c_attn"],
    ),
    "bert": Kind(
        lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=3)),
        "AutoModelForSequenceClassification", IDS, ["query", "value"],
    ),
    "t5": Kind(
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        "AutoModelForSeq2SeqLM", T5_INPUTS, ["q", "wo"],
    ),
    "vit": Kind(vit, "AutoModelForImageClassification", PIXELS, ["q_proj", "v_proj"]),
    "resnet": Kind(resnet, "AutoModelForImageClassification", PIXELS, ["convolution"]),
    "sentence-transformers": Kind(
        lambda: T.BertModel(T.BertConfig(**TEXT)), "AutoModel", IDS, ["query", "value"]
    ),
}  # fmt: skip
METHODS = {
    "mean": {},
    "ties": {"density": 0.5},
    "dare-linear": {"density": 0.5, "seed": 3},
    "tall-mask": {"lambda": 0.4, "k": 1},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = {
    ("llama", "bake", "bfloat16"), ("tied llama", "mean", "float32"), ("qwen3-moe", "ties", "bfloat16"),
    ("resnet", "mean", "float32"), ("sentence-transformers", "dare-linear", "bfloat16"), ("gpt2", "--as-lora", "float32"),
}  # fmt: skip
CASES = [
    pytest.param(kind, do, dtype, marks=() if (kind, do, dtype) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for do in ("bake", *METHODS, "--as-lora")
    for dtype in DTYPES
    if (kind, do) != ("resnet", "--as-lora")  # refused, see below
]
Tensors = dict[str, Tensor]


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the model computes, in float32: its logits or, without a head, its hidden states."""
    with torch.no_grad():
        found = copy.deepcopy(model).float().eval()(**inputs)
    tensor: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return tensor


def moved(model: nn.Module, seed: int, only: list[str] | None = None) -> nn.Module:
    """Return a copy of a model whose weights, or those of some modules, moved at random."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only is None or (name.endswith("weight") and name.split(".")[-2] in only):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * 0.05).to(parameter.dtype))
    return other


def command(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def save(model: nn.Module, kind: str, folder: Path) -> Path:
    saved: Any = model
    saved.save_pretrained(folder)
    if kind == "sentence-transformers":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}')
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        entries = [
            f'{{"idx": {i}, "name": "{i}", "path": "{path}", "type": "sentence_transformers.models.{name}"}}'
            for i, (path, name) in enumerate(modules)
        ]
        (folder / "modules.json").write_text(f"[{', '.join(entries)}]")
    return folder


def stored(folder: Path) -> Tensors:
    """Return the floating-point tensors of a folder, in float64."""
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor.double() for name, tensor in found.items() if tensor.is_floating_point()}


def merged(method: str, base: Tensors, runs: list[Tensors], out: Tensors) -> Tensors:
    """Merge by the formulas of the papers. DARE's draws are those that the output shows, and are checked to be draws."""
    deltas = [{name: run[name] - base[name] for name in base} for run in runs]
    if method == "ties":  # Yadav et al. 2023, density 0.5 of the whole task vector, which leaves draws at the median
        deltas = [
            {name: torch.where(tensor.abs() >= middle, tensor, 0) for name, tensor in delta.items()}
            for delta in deltas
            for middle in [
                torch.cat([tensor.abs().flatten() for name, tensor in delta.items() if not _is_buffer(name)]).median()
            ]
        ]
    rules = {"mean": _mean, "ties": _elected, "tall-mask": _masked}
    if method == "dare-linear":
        return {name: base[name] + _as_drawn(torch.stack([d[name] for d in deltas]), out[name] - base[name]) for name in base}
    return {name: base[name] + rules[method](torch.stack([delta[name] for delta in deltas])) for name in base}


def _is_buffer(name: str) -> bool:
    """Return whether a tensor is a running statistic, which is no part of the task vector."""
    return ".running_" in name


def _mean(deltas: Tensor) -> Tensor:
    return deltas.mean(dim=0)


def _elected(deltas: Tensor) -> Tensor:
    agreeing = (deltas.sign() == deltas.sum(dim=0).sign()) & (deltas != 0)
    return (deltas * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def _masked(deltas: Tensor) -> Tensor:
    """Return the mean where one of the masks of Wang et al. 2024 is set."""
    mean = deltas.mean(dim=0)
    return mean * (deltas.abs() > 0.4 * (mean - deltas).abs()).any(dim=0)


def _as_drawn(deltas: Tensor, found: Tensor) -> Tensor:
    """Return the sum of the τ_t / 0.5 (Yu et al. 2024) of the runs, each with or without each of its elements, that is nearest.

    Every element is kept with probability one half, so that of many elements about a half are.
    """
    draws = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)], dtype=deltas.dtype)
    sums = torch.einsum("dt,t...->d...", draws, deltas / 0.5)
    nearest = (sums - found).abs().argmin(dim=0)
    kept = draws[nearest].mean(dim=tuple(range(nearest.ndim)))
    moved = deltas.abs().sum(dim=0).count_nonzero()
    assert moved < 200 or bool(((kept - 0.5).abs() < 0.2).all()), "no draws with probability one half"
    return sums.gather(0, nearest[None])[0]


@pytest.mark.parametrize(("kind", "do", "dtype"), CASES)
def test_the_output_loads_by_its_folder_and_computes_what_it_should(
    kind: str, do: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, auto, inputs, targets = KINDS[kind]
    model = make().to(DTYPES[dtype]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.uniform_(0.5, 1.5)
    base, out = save(model, kind, tmp_path / "base"), tmp_path / "out"
    if do == "bake":
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        live = peft.get_peft_model(copy.deepcopy(model), config)
        live.save_pretrained(tmp_path / "adapter")
        expected: nn.Module = live
        command("bake", base, tmp_path / "adapter", "-o", out, "--quiet")
    else:
        only = targets if do == "--as-lora" else None
        runs = [moved(model, seed, only) for seed in (1, 2)]
        folders = [save(run, kind, tmp_path / f"run-{n}") for n, run in enumerate(runs)]
        method = "mean" if do == "--as-lora" else do
        options = [f"--set={key}={value}" for key, value in METHODS[method].items()]
        more = ["--as-lora", "16"] if do == "--as-lora" else []
        command("merge", base, *folders, "--method", method, *options, *more, "-o", out, "--quiet")
        read = stored(out) if do != "--as-lora" else {}
        reference = merged(method, stored(base), [stored(folder) for folder in folders], read)
        assert do == "--as-lora" or set(read) == set(reference)
        shutil.copytree(base, tmp_path / "expected")
        whole = load_file(base / "model.safetensors")
        values = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in reference.items()}
        save_file(whole | values, tmp_path / "expected/model.safetensors", {"format": "pt"})
        expected = getattr(T, auto).from_pretrained(tmp_path / "expected")
    monkeypatch.chdir(tmp_path)
    loader = getattr(T, auto)
    if do == "--as-lora":
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), out)
    else:
        loaded, report = loader.from_pretrained("out", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.dtype == DTYPES[dtype]
        if kind == "sentence-transformers":
            assert (out / "1_Pooling/config.json").is_file() and (out / "modules.json").is_file()
    wanted, found = output(expected, inputs), output(loaded, inputs)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    assert (found - output(model, inputs)).norm() > 10 * (found - wanted).norm() or dtype == "bfloat16"


def test_convolutions_fit_into_no_adapter_and_are_named(tmp_path: Path) -> None:
    """PEFT can hold them, but a change of a kernel is rarely of low rank; --allow-partial leaves them out."""
    torch.manual_seed(0)
    model = resnet().eval()
    base, run = save(model, "resnet", tmp_path / "base"), save(moved(model, 1, ["convolution"]), "resnet", tmp_path / "run")
    arguments = ["merge", str(base), str(run), "--method", "mean", "--as-lora", "4", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "a tensor that moved fits into no adapter" in result.output and "convolution" in result.output
