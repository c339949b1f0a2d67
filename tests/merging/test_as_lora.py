"""A merge as an adapter: truncated exactly, and loaded by PEFT itself."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from emomerge.adapters import bake
from emomerge.checkpoints import MemoryCheckpoint, load_into, model_checkpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput
from emomerge.merging import merge
from emomerge.merging.lora import low_rank, truncate

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))


def gpt2(tied=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=tied, **sizes))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL))


def output(model):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    tokens = torch.randint(0, 50, (4, 7), generator=generator)
    vision = model.config.model_type == "vit"
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits if vision else model.eval()(input_ids=tokens).logits


def moved(base, names, exact_run, size=0.3):
    """A run that moves these tensors."""
    taus = dict.fromkeys(base) | {name: size * torch.randn(base[name].shape) for name in names}
    return exact_run(base, taus)


def matrices(base, *parts):
    return [name for name in base if base[name].ndim == 2 and any(part in name for part in parts)]


CASES = {
    "linear": (bert, ("query", "dense")),
    "embeddings": (bert, ("word_embeddings", "value")),
    "conv1d": (gpt2, ("c_attn", "c_proj", "lm_head")),
    "embedding and conv1d": (gpt2, ("c_fc", "wte")),
    "renamed on disk": (vit, ("query", "dense", "classifier")),
}


@pytest.mark.parametrize("rank", [3, "auto", 64])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_truncated_dense_merge_does(case, rank, tmp_path, exact_run):
    from peft import PeftModel

    make, parts = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    names = matrices(base, *parts)
    merged = merge(base, [moved(base, names, exact_run) for _ in range(3)], method="mean")
    truncated = truncate(merged, base, rank=rank, energy=0.9)
    truncated.adapter().write(tmp_path / "adapter")
    assert [layer.name for layer in truncated.layers] == names
    assert truncated.adapter().config()["fan_in_fan_out"] == (make is gpt2)

    dense = dict(base)
    for layer in truncated.layers:
        u, s, vh = torch.linalg.svd(merged.delta(layer.name, base), full_matrices=False)
        r = layer.rank
        dense[layer.name] = base[layer.name] + (u[:, :r] * s[:r]) @ vh[:r]
        shares = s.double().square().cumsum(0) / s.double().square().sum()
        figures = truncated.figures()["layers"][layer.name]
        assert figures["energy"] == pytest.approx(shares[r - 1].item(), rel=1e-5)
        if rank == "auto":
            assert shares[r - 1] >= 0.9 > (shares[r - 2] if r > 1 else 0)
        else:
            assert r == min(rank, *base[layer.name].shape)
    expected = copy.deepcopy(model)
    load_into(expected, MemoryCheckpoint(dense))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        live = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(output(live), output(expected), rtol=0, atol=1e-5)
    assert (output(make()) - output(expected)).abs().max() > 0.01
    baked = bake(base, tmp_path / "adapter")
    assert set(baked.touched()) == {*names, *truncated.saved}
    for name in names:
        torch.testing.assert_close(baked[name], dense[name], rtol=0, atol=1e-5)


def test_a_mean_of_loras_at_the_sum_of_their_ranks_is_the_dense_merge(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(tmp_path / "base")
    for run in range(3):
        config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["query", "dense", "word_embeddings"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / f"run{run}", save_embedding_layers=False)
    base = open_checkpoint(tmp_path / "base")
    merged = merge(base, [tmp_path / f"run{run}" for run in range(3)], method="mean")
    truncated = truncate(merged, base, rank=6)
    truncated.adapter().write(tmp_path / "adapter")
    assert truncated.figures()["energy"] == pytest.approx(1, abs=5e-6)
    baked = bake(base, tmp_path / "adapter")
    assert baked.touched()
    for name in base:
        torch.testing.assert_close(baked[name], merged[name], rtol=0, atol=1e-5)


def test_what_no_adapter_holds_is_refused_or_listed(exact_run):
    torch.manual_seed(0)
    base = model_checkpoint(bert(), source="b")
    bias, norm = "classifier.bias", "bert.embeddings.LayerNorm.weight"
    run = moved(base, ["classifier.weight", bias, norm], exact_run)
    merged = merge(base, [run], method="mean")
    with pytest.raises(
        BadInput, match=r"fits into no adapter: bert.embeddings.LayerNorm.weight; found 1 dimensions.*--allow-part"
    ):
        truncate(merged, base, rank=2)
    truncated = truncate(merged, base, rank=3, allow_partial=True)
    squared = {name: run.taus[name].double().square().sum().item() for name in ("classifier.weight", bias, norm)}
    figures, total = truncated.figures(), sum(squared.values())
    assert figures["left_out"] == pytest.approx({name: squared[name] / total for name in (bias, norm)})
    assert figures["energy"] == pytest.approx(squared["classifier.weight"] / total)
    assert figures["layers"]["classifier.weight"]["energy"] == pytest.approx(1)
    still = merge(base, [moved(base, [], exact_run)], method="mean")
    with pytest.raises(BadInput, match="no matrix moved"):
        truncate(still, base, rank=2)


@pytest.mark.parametrize("make", [bert, vit])
def test_a_fresh_head_is_held_whole(make, tmp_path, exact_run):
    from peft import PeftModel

    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    head = ["classifier.weight", "classifier.bias"]
    merged = merge(base, [moved(base, [*matrices(base, "query"), *head], exact_run) for _ in range(2)], method="mean")
    truncated = truncate(merged, base, rank=16)
    truncated.adapter().write(tmp_path / "adapter")
    assert list(truncated.saved) == sorted(head)
    listed = truncated.adapter().config()["modules_to_save"]
    assert listed == (None if make is bert else ["classifier"])  # PEFT itself adds those of a text classifier
    assert truncated.figures()["energy"] == pytest.approx(1)
    expected = copy.deepcopy(model)
    load_into(expected, merged)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        live = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(output(live), output(expected), rtol=0, atol=1e-5)
    baked = bake(base, tmp_path / "adapter")
    assert all(torch.equal(baked[name], merged[name]) for name in head)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, num_labels=3, pad_token_id=0, **SMALL))


def tokens_bert():
    from transformers import BertConfig, BertForTokenClassification

    return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))


def bare_bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=50, **SMALL))


@pytest.mark.parametrize(
    "make, auto, parts",
    [
        (bert, "AutoPeftModelForSequenceClassification", ("query", "classifier")),
        (roberta, "AutoPeftModelForSequenceClassification", ("query", "classifier.dense", "out_proj")),
        (tokens_bert, "AutoPeftModelForTokenClassification", ("query", "classifier")),
        (gpt2, "AutoPeftModelForCausalLM", ("c_attn",)),
        (t5, "AutoPeftModelForSeq2SeqLM", ("SelfAttention.q",)),
        (bare_bert, "AutoPeftModelForFeatureExtraction", ("query",)),
        (vit, "AutoPeftModel", ("query", "classifier")),
    ],
)
def test_the_auto_class_of_peft_loads_the_adapter_with_its_base(make, auto, parts, tmp_path, exact_run):
    import peft

    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    merged = merge(base, [moved(base, matrices(base, *parts), exact_run)], method="mean")
    truncate(merged, base, rank=16).adapter().write(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        live = getattr(peft, auto).from_pretrained(tmp_path / "adapter", local_files_only=True)
    saved = live.peft_config["default"].modules_to_save or []
    assert len(saved) == len(set(saved))
    expected = live.get_base_model()
    inner = live.merge_and_unload()
    dense = model_checkpoint(inner, source="merged by PEFT")
    assert inner is expected
    for name in merged:
        torch.testing.assert_close(dense[name], merged[name].float(), rtol=0, atol=1e-5)


def test_a_tied_embedding_and_attention_in_one_piece_are_refused(tmp_path, exact_run):
    gpt2(tied=True).save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    merged = merge(base, [moved(base, ["transformer.wte.weight"], exact_run)], method="mean")
    with pytest.raises(BadInput, match="tied to lm_head.weight"):
        truncate(merged, base, rank=2)
    base = model_checkpoint(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), source="a")
    for name in ("a.in_proj_weight", "a.out_proj.weight"):
        with pytest.raises(BadInput, match=f"{name}; found (not the weight of a layer|a part of nn.MultiheadAttention)"):
            truncate(merge(base, [moved(base, [name], exact_run)], method="mean"), base, rank=2)


def test_single_experts_of_a_stack_are_refused_or_left_out(tmp_path, exact_run):
    from peft import AutoPeftModelForCausalLM
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=50, **SMALL, **sizes)).save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    merged = merge(base, [moved(base, matrices(base, "experts.0.w1", "q_proj"), exact_run)], method="mean")
    with pytest.raises(BadInput, match="found one of stacked experts"):
        truncate(merged, base, rank=2)
    truncate(merged, base, rank=16, allow_partial=True).adapter().write(tmp_path / "adapter")
    live = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", local_files_only=True).merge_and_unload()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(live.state_dict()[name], merged[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": "auto", "energy": 0}, {"rank": "auto", "energy": 1.5}])
def test_impossible_requests(wrong, exact_run):
    base = MemoryCheckpoint({"a.weight": torch.zeros(2, 2)})
    with pytest.raises(BadInput):
        truncate(merge(base, [moved(base, ["a.weight"], exact_run)], method="mean"), base, **wrong)


def test_layers_whose_names_end_alike_keep_their_own_rank(tmp_path, exact_run):
    from peft import PeftModel

    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.inner = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x):
            return self.inner["fc"](self.fc(x).tanh())

    model = Model()
    base = model_checkpoint(model, source="m")
    low = torch.outer(torch.randn(6), torch.randn(6))
    run = exact_run(base, dict.fromkeys(base) | {"fc.weight": low, "inner.fc.weight": torch.randn(6, 6)})
    truncated = truncate(merge(base, [run], method="mean"), base, rank="auto", energy=0.9999)
    assert {layer.name: layer.rank for layer in truncated.layers} == {"fc.weight": 1, "inner.fc.weight": 6}
    truncated.adapter().write(tmp_path / "adapter")
    x = torch.randn(5, 6)
    expected = Model()
    load_into(expected, run)
    live = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    torch.testing.assert_close(live(x), expected(x), rtol=0, atol=1e-5)

    run = exact_run(base, dict.fromkeys(base) | {"fc.weight": low})
    truncate(merge(base, [run], method="mean"), base, rank=2).adapter().write(tmp_path / "one")
    load_into(expected, run)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        live = PeftModel.from_pretrained(model, tmp_path / "one")
    torch.testing.assert_close(live(x), expected(x), rtol=0, atol=1e-5)


def spectrum(values, rows, columns):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0] for n in (rows, columns))
    return (u * torch.tensor(values)) @ v.T


@pytest.mark.parametrize("shape", [(700, 640), (640, 700)])
@pytest.mark.parametrize("decay", [0.99, 0.9])
def test_a_sketch_finds_what_the_exact_decomposition_does(shape, decay):
    values = [decay**i for i in range(300)]
    tau = spectrum(values, *shape)
    for rank in (5, 60):
        a, b = low_rank(tau, rank, name="w")
        best = sum(x * x for x in values[:rank]) / sum(x * x for x in values)
        captured = 1 - ((tau - b @ a).double().square().sum() / tau.double().square().sum()).item()
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert best - 1e-3 < captured < best + 1e-6
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-5)


def test_the_smallest_rank_for_an_energy_in_a_large_matrix_and_its_cap():
    tau = spectrum([2.0] * 3 + [1.0] * 40, 700, 640)
    for energy, rank in ((0.5, 17), (0.9, 38), (0.99, 43)):
        a, _ = low_rank(tau, 256, energy=energy, name="w")
        assert len(a) == rank
    assert len(low_rank(tau, 20, energy=0.99, name="w")[0]) == 20


def test_the_bits_depend_on_the_name_alone():
    tau = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    first = low_rank(tau, 8, name="w")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    again = low_rank(tau, 8, name="w")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], low_rank(tau, 8, name="v")[0])


def test_factors_in_half_precision(tmp_path, exact_run):
    base = MemoryCheckpoint({"a.weight": torch.zeros(6, 4)}, source="base")
    truncated = truncate(merge(base, [moved(base, ["a.weight"], exact_run)], method="mean"), base, rank=2)
    truncated.adapter().write(tmp_path / "adapter", dtype="bfloat16", extra_files={"note.txt": "x"})
    written = open_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {written.info(name).dtype for name in written} == {torch.bfloat16}
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_alpha"] == 2
    with pytest.raises(BadInput, match="exists"):
        truncated.adapter().write(tmp_path / "adapter")
    huge = truncate(
        merge(base, [exact_run(base, {"a.weight": torch.full((6, 4), 1e12)})], method="mean"), base, rank=2
    )  # fmt: skip
    with pytest.raises(BadInput, match="too large for torch.float16"):
        huge.adapter().write(tmp_path / "huge", dtype="float16")
    assert not (tmp_path / "huge").exists()


def test_a_headless_base_is_adapted_by_its_own_names(tmp_path, exact_run):
    from peft import PeftModel

    torch.manual_seed(0)
    model = bert().bert
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    merged = merge(base, [moved(base, matrices(base, "query"), exact_run)], method="mean")
    truncate(merged, base, rank=16).adapter().write(tmp_path / "adapter")
    live = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    write_checkpoint(merged, tmp_path / "dense", files_from=tmp_path / "base")
    load_into(model, open_checkpoint(tmp_path / "dense"))
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=tokens).last_hidden_state for m in (live, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
