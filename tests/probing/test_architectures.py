"""Every metric puts the weights of transformers' architectures back to the bit, and swaps what it can."""

import pytest
import torch

import emomerge
from emomerge.probing import METRICS, Perturbable, perturb, rms

transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = TINY | {"num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": False}
TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 8, 30]])

ARCHITECTURES = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "tied Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER | {"tie_word_embeddings": True}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 2}),
    "BERT": ("BertForSequenceClassification", "BertConfig", TINY),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in TINY.items() if k != "vocab_size"} | {"image_size": 4, "patch_size": 2, "num_channels": 1},
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 32, "hidden_size": 8, "state_size": 2, "num_hidden_layers": 1, "expand": 1, "time_step_rank": 2},
    ),
}
FEW = {
    "gaussian": {"radii": (0.1,), "directions": 1},
    "adaptive": {"radii": (0.1,), "directions": 1},
    "basin": {"directions": 1, "bisections": 2},
    "curve": {"alphas": (0.5,)},
    "barriers": {"points": 3},
    "plane": {"size": 2},
    "surface": {"size": 2},
    "hessian": {"steps": 2, "probes": 1},
    "span": {},
    "worst-case": {"steps": 3, "radii": {"l2": (0.5,), "linf": (0.001,)}},
}


def build(name):
    torch.manual_seed(0)
    kind, config, options = ARCHITECTURES[name]
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def loss(model, batch):
    found = model(**batch)
    return found.loss, float(batch["labels"].numel())


def batch_of(name):
    if name == "ViT":
        return {"pixel_values": torch.linspace(-1, 1, 32).view(2, 1, 4, 4), "labels": torch.tensor([0, 1])}
    return {"input_ids": TOKENS, "labels": torch.tensor([0, 1]) if name == "BERT" else TOKENS}


def bits(model):
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items() if tensor.ndim}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kept", [perturb.KEPT_BYTES, 0], ids=["at once", "by module"])
def test_weights_are_restored_to_the_bit_after_every_metric_and_exception(name, kept, monkeypatch):
    monkeypatch.setattr(perturb, "KEPT_BYTES", kept)
    model, base, other, batches = build(name), build(name), build(name), [batch_of(name)]
    with torch.no_grad():
        for scale, moved in ((0.1, model), (-0.1, other)):
            for number, parameter in enumerate(moved.parameters()):
                parameter.add_(torch.randn_like(parameter), alpha=scale * (1 + number % 3))
    before, parameters = bits(model), dict(model.named_parameters())

    def check():
        assert all(torch.equal(before[k], v) for k, v in bits(model).items())
        assert all(p is parameters[k] for k, p in model.named_parameters())

    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyError("interrupted")
        return loss(model, batch)

    given = {"reference": base, "others": {"other": other}}
    for metric, needs in ((name, METRICS[name].needs) for name in METRICS if name in FEW):
        options = {key: value for key, value in given.items() if key == "reference" or "others" in needs}
        calls, limit = 0, None
        emomerge.probe(model, counted, batches, {metric: FEW[metric]}, **options)
        check()
        calls, limit = 0, calls
        with pytest.raises(KeyError):
            emomerge.probe(model, counted, batches, {metric: FEW[metric]}, **options)
        check()
    swappable = Perturbable(model, loss, batches, rms(base)).is_swappable
    assert swappable is (name != "Mamba" or kept > 0)  # its mixer reads the weight of its convolution
