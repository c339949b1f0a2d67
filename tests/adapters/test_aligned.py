"""Files of one model that store it differently: tied tensors, prefixes and heads, wrappers, experts."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.adapters import bake, naming, open_dense, open_run
from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput, Note
from emomerge.merging import merge

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**more: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, **{"tie_word_embeddings": True, **more}))


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


def bert(kind: str = "BertForMaskedLM", **more: object) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **more))


def gpt2(kind: str = "GPT2LMHeadModel") -> nn.Module:
    import transformers

    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return getattr(transformers, kind)(transformers.GPT2Config(**sizes))


def llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SMALL}
    vision.pop("vocab_size")
    text = {"model_type": "qwen2", "num_key_value_heads": 1, **SMALL}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, tie_word_embeddings=True)
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3))


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return other


def save(model: nn.Module, folder: Path, **also: torch.Tensor) -> Path:
    """Save as transformers does, with further tensors in the file."""
    model.save_pretrained(folder)
    if also:
        tensors = {name: open_checkpoint(folder)[name].clone() for name in open_checkpoint(folder)}
        write_checkpoint(MemoryCheckpoint({**tensors, **also}), folder / "model.safetensors", force=True)
    return folder


def rewrite(folder: Path, rename) -> Path:
    """Rename the tensors of a saved model, or leave out those whose new name is None."""
    tensors = {rename(name): tensor.clone() for name, tensor in open_checkpoint(folder).items()}
    tensors.pop(None, None)
    write_checkpoint(MemoryCheckpoint(tensors), folder / "model.safetensors", force=True)
    return folder


ALIASES = {
    "llama": (llama, "model.embed_tokens.weight", ["lm_head.weight"]),
    "gemma": (gemma, "model.embed_tokens.weight", ["lm_head.weight"]),
    "gpt2": (gpt2, "transformer.wte.weight", ["lm_head.weight"]),
    "llava": (llava, "language_model.model.embed_tokens.weight", ["language_model.lm_head.weight"]),
    "bert": (bert, "bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
    "bert's bias": (bert, "cls.predictions.bias", ["cls.predictions.decoder.bias"]),
    "t5": (t5, "shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]),
}


@pytest.fixture(params=ALIASES)
def tied(request):
    torch.manual_seed(0)
    make, owner, aliases = ALIASES[request.param]
    return make(), owner, aliases


def again(folder: Path, owner: str, aliases: list[str]) -> Path:
    """Store a tied tensor under its other names as well."""
    tensor = open_checkpoint(folder)[owner]
    tensors = {**open_checkpoint(folder), **{alias: tensor.clone() for alias in aliases}}
    write_checkpoint(MemoryCheckpoint({n: t.clone() for n, t in tensors.items()}), folder / "model.safetensors", force=True)
    return folder


@pytest.mark.parametrize("options", [{"method": "dare-linear"}, {"method": "della"}, {"method": "ties", "trim": "global"}])
def test_a_tensor_stored_twice_is_merged_drawn_and_written_once(tied, options, tmp_path):
    model, owner, aliases = tied
    paths = [save(each, tmp_path / name) for each, name in ((model, "base"), (moved(model), "a"), (moved(model), "b"))]
    once = merge(*(paths[0], paths[1:]), **options)
    plain = {name: once[name].clone() for name in once}
    for path in paths:
        again(path, owner, aliases)
    twice = merge(*(paths[0], paths[1:]), **options)
    assert twice.names() == once.names()
    assert all(torch.equal(twice[name], plain[name]) for name in plain)
    write_checkpoint(twice, tmp_path / "out", rounding="stochastic", dtype="bfloat16", files_from=paths[0])
    loaded, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    if (head := loaded.get_output_embeddings()) is not None:
        assert torch.equal(head.weight, loaded.get_input_embeddings().weight)


def test_a_tied_tensor_may_be_missing_under_either_name(tied, tmp_path):
    model, owner, aliases = tied
    base, run = save(model, tmp_path / "base"), save(moved(model), tmp_path / "run")
    expected = open_checkpoint(run)[owner].clone()
    again(run, owner, aliases)
    torch.testing.assert_close(merge(base, [run], method="mean")[owner], expected)
    rewrite(run, lambda name: None if name in (owner, *aliases[1:]) else name)
    torch.testing.assert_close(merge(base, [run], method="mean")[owner], expected)
    rewrite(base, lambda name: aliases[0] if name == owner else name)
    torch.testing.assert_close(merge(base, [run], method="mean")[aliases[0]], expected)


@pytest.mark.parametrize("stale", ["owner", "alias"])
def test_a_stale_name_of_a_tied_tensor_is_refreshed(tied, stale, tmp_path):
    model, owner, aliases = tied
    base, run = (save(each, tmp_path / name) for each, name in ((model, "base"), (moved(model), "run")))
    old, new = open_checkpoint(base)[owner].clone(), open_checkpoint(run)[owner].clone()
    again(run, owner, aliases)
    left = [owner] if stale == "owner" else aliases
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(run).items()} | {name: old.clone() for name in left}
    write_checkpoint(MemoryCheckpoint(tensors), run / "model.safetensors", force=True)
    with pytest.warns(Note, match="still has the base's value"):
        merged = merge(again(base, owner, aliases), [run], method="mean")
    assert not set(merged.names()) & set(aliases)
    torch.testing.assert_close(merged[owner], new)


def test_two_values_for_one_tensor_are_refused(tied, tmp_path):
    model, owner, aliases = tied
    base, run = save(model, tmp_path / "base"), save(moved(model), tmp_path / "run")
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(run).items()}
    write_checkpoint(MemoryCheckpoint({**tensors, aliases[0]: tensors[owner] + 1}), run / "model.safetensors", force=True)
    with pytest.raises(BadInput, match="two values"):
        merge(base, [run], method="mean")


def test_what_the_file_holds_apart_or_the_configuration_unties_stays_two_tensors(tmp_path):
    torch.manual_seed(0)
    names = {"lm_head.weight", "model.embed_tokens.weight"}
    untied = llama(tie_word_embeddings=False)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    assert names <= set(open_dense(save(untied, tmp_path / "untied")))
    apart = save(llama(), tmp_path / "apart", **{"lm_head.weight": torch.randn(40, 16)})
    assert names <= set(open_dense(apart))


@pytest.mark.parametrize("make", [llama, gpt2, llava])
def test_without_transformers_usual_names_and_the_configuration_tell_ties(make, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = make()
    owner, aliases = next(entry[1:] for entry in ALIASES.values() if entry[0] is make)
    base, run = (again(save(each, tmp_path / name), owner, aliases) for each, name in ((model, "base"), (moved(model), "run")))
    monkeypatch.setattr(naming, "installed", lambda name: False)
    merged = merge(base, [run], method="dare-linear", density=0.5)
    assert len(set(merged.names()) & {owner, *aliases}) == 1


HEADS = {
    "bare BERT": (lambda: bert("BertModel"), bert, "bert."),
    "bare GPT-2": (lambda: gpt2("GPT2Model"), gpt2, "transformer."),
    "bare Llama": (lambda: llama().model, lambda: llama(tie_word_embeddings=False), "model."),
    "another head": (bert, lambda: bert("BertForSequenceClassification", num_labels=3), ""),
}


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_models_with_and_without_head_share_their_trunk(kind, swapped, configured, tmp_path):
    torch.manual_seed(0)
    *makes, prefix = HEADS[kind]
    if not configured and kind == "another head":
        pytest.skip("without configurations, these are files of one model that do not fit")
    base, run = (save(moved(make()), tmp_path / str(n)) for n, make in enumerate(reversed(makes) if swapped else makes))
    if not configured:
        for path in (base, run):
            (path / "config.json").unlink()
    origin, tuned = open_checkpoint(base), open_checkpoint(run)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = merge(base, [run], method="mean")
        state = {name: merged[name] for name in merged}
    assert set(state) == set(origin)
    shared = {name: own for name in origin for own in (name, prefix + name, name.removeprefix(prefix)) if own in tuned}
    assert len(shared) >= 20
    for name in origin:
        torch.testing.assert_close(state[name], tuned[shared[name]] if name in shared else origin[name])
    heads = set(origin) ^ set(shared) or set(tuned) - set(shared.values())
    assert not heads or any(issubclass(warning.category, Note) for warning in told)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("names", ["of this version", "of an earlier version"])
def test_a_text_model_is_merged_into_a_model_of_text_and_images(names, configured, tmp_path):
    """Its vision tower and its projector are kept, their embeddings included."""
    torch.manual_seed(0)
    base = save(llava(), tmp_path / "base")
    if names == "of an earlier version":
        rewrite(base, lambda name: re.sub(r"^model\.(vision_tower|multi_modal_projector)", r"\1", name).replace(
            "model.language_model.", "language_model.model."))  # fmt: skip
    text = llava().model.language_model
    run = save(text_model(text), tmp_path / "run")
    if not configured:
        (base / "config.json").unlink()
    origin, tuned = open_checkpoint(base), open_checkpoint(run)
    with pytest.warns(Note, match="those of the base are kept"):
        merged = merge(base, [run], method="mean")
        state = {name: merged[name] for name in merged}
    assert set(state) == set(origin)
    moved = {name: next((own for own in tuned if name.endswith(f".{own.removeprefix('model.')}")), None) for name in origin}
    language = [name for name in origin if "language_model" in name and "lm_head" not in name]
    assert len(language) > 15 and all(moved[name] for name in language)
    for name in origin:
        own = moved[name] if "language_model" in name else None
        torch.testing.assert_close(state[name], tuned[own] if own else origin[name])


def text_model(text):
    """A model of its own with the sizes of another's text model."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(1)
    text.config.tie_word_embeddings = True
    return Qwen2ForCausalLM(text.config)


@pytest.mark.parametrize("damage", ["lacks a layer", "has a further layer", "lacks the embedding"])
def test_a_trunk_that_does_not_fit_is_still_refused(damage, tmp_path):
    base, run = save(bert("BertModel"), tmp_path / "base"), save(bert(), tmp_path / "run")
    if damage == "lacks a layer":
        rewrite(run, lambda name: None if ".layer.1." in name else name)
    elif damage == "lacks the embedding":
        rewrite(run, lambda name: None if "embeddings" in name else name)
    else:
        rewrite(base, lambda name: None if ".layer.1." in name else name)
    with pytest.raises(BadInput, match="run (lacks|has) a tensor"):
        merge(base, [run], method="mean")


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"])
def test_names_with_wrappers_of_torch_are_found(wrap, configured, tmp_path):
    torch.manual_seed(0)
    model = llama()
    base, run = save(model, tmp_path / "base"), save(moved(model), tmp_path / "run")
    expected = {name: tensor.clone() for name, tensor in open_checkpoint(run).items()}
    rewrite(run, wrap.format)
    if not configured:
        (base / "config.json").unlink()
    merged = merge(base, [run], method="mean")
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name])


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("older", ["base", "run"])
@pytest.mark.parametrize(
    ("make", "buffer"),
    [
        (gpt2, "transformer.h.{}.attn.bias"),
        (lambda: llama(tie_word_embeddings=False), "model.layers.{}.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_buffers_that_earlier_versions_saved_are_no_weights(make, buffer, older, configured, tmp_path):
    torch.manual_seed(0)
    model = make()
    further = {buffer.format(layer): torch.rand(1, 1, 4, 4) for layer in range(2)}
    base = save(model, tmp_path / "base", **(further if older == "base" else {}))
    run = save(moved(model), tmp_path / "run", **(further if older == "run" else {}))
    if not configured:
        (base / "config.json").unlink()
    merged = merge(base, [run], method="mean")
    origin, tuned = open_checkpoint(base), open_checkpoint(run)
    assert set(merged) == set(origin)
    for name in merged:
        torch.testing.assert_close(merged[name], origin[name] if name in further else tuned[name])


def test_names_of_other_versions_of_transformers_are_found(tmp_path):
    torch.manual_seed(0)
    for make, old in (
        (bert, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")),
        (llava, lambda name: name.replace("language_model.model.", "model.language_model.")),
    ):
        model = make()
        base, run = save(model, tmp_path / f"{old}-base"), save(moved(model), tmp_path / f"{old}-run")
        expected = {name: tensor.clone() for name, tensor in open_checkpoint(run).items()}
        rewrite(run, old)
        assert set(open_checkpoint(run)) != set(expected)
        merged = merge(base, [run], method="mean")
        for name in merged:
            torch.testing.assert_close(merged[name], expected[name])


@pytest.mark.parametrize("stacked", ["base", "run"])
def test_experts_merge_across_layouts(stacked, tmp_path):
    torch.manual_seed(0)
    model = mixtral()
    tuned = moved(model)
    base, run = save(model, tmp_path / "base"), save(tuned, tmp_path / "run")
    expected = open_checkpoint(run) if stacked == "run" else MemoryCheckpoint(tuned.state_dict())
    one = model if stacked == "base" else tuned
    path = base if stacked == "base" else run
    state = MemoryCheckpoint({name: tensor.clone() for name, tensor in one.state_dict().items()})
    expected = {name: expected[name].clone() for name in expected}
    write_checkpoint(state, path / "model.safetensors", force=True)
    merged = merge(base, [run], method="mean")
    assert set(merged.names()) == set(open_checkpoint(base))
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name])


@pytest.mark.parametrize("kind", ["bare BERT", "bare GPT-2", "bare Llama"])
def test_bake_and_merge_find_the_same_tensors(kind, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = HEADS[kind][1]()
    base = save(getattr(model, model.base_model_prefix), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
        live.save_pretrained(tmp_path / "adapter")
        dense = save(live.merge_and_unload(), tmp_path / "dense")
        baked = bake(base, tmp_path / "adapter", allow_unmatched=True)  # the adapter may also change the head
        run = open_run(open_dense(base), dense)
    assert len(baked.touched()) >= 8
    for name in baked:
        torch.testing.assert_close(run[name], baked[name])
