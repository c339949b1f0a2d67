"""Following the advice of messages about merges, their methods, records and mergekit configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from advising import Scenario, Scenarios, W, adapter, model, refused, works
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import Checkpoint, MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import merge

SCENARIOS = Scenarios()
follows = SCENARIOS.follows


def three(tmp: Path) -> tuple[Path, Path, Path]:
    """Write a base and two runs."""
    return model(tmp / "base", a=W, b=W), model(tmp / "run-a", a=W * 2, b=W + 1), model(tmp / "run-b", a=W * 3, b=W - 1)


@follows("did you mean `{}`?", "known: {}")
def _method(tmp: Path) -> None:
    given, out = three(tmp), ("-o", tmp / "out")
    message = refused("merge", *given, "--method", "tise", *out)
    works("merge", *given, "--method", message.rpartition("did you mean `")[2].rstrip("`?"), *out)
    message = refused("merge", *given, "--method", "ties", "--set", "densty=0.5", "-o", tmp / "again")
    assert message.endswith("did you mean `density`?")
    works("merge", *given, "--method", "ties", "--set", "density=0.5", "-o", tmp / "again")
    known = refused("merge", *given, "--method", "xyz", "-o", tmp / "third").rpartition("known: ")[2].split(", ")
    works("merge", *given, "--method", known[known.index("mean")], "-o", tmp / "third")


@follows("write `--set {}=VALUE`")
def _set(tmp: Path) -> None:
    given = three(tmp)
    assert "write `--set k=VALUE`" in refused("merge", *given, "--method", "ties", "--k", "2", "-o", tmp / "out")
    works("merge", *given, "--method", "ties", "--set", "density=0.5", "-o", tmp / "out")


@follows("merge with --save-masks")
def _masks(tmp: Path) -> None:
    base, *runs = three(tmp)
    arguments = ("merge", base, *runs, "--method", "tall-mask")
    works(*arguments, "-o", tmp / "without")
    assert refused("reconstruct", tmp / "without", "run-a", "-o", tmp / "again").endswith("merge with --save-masks")
    works(*arguments, "--save-masks", "-o", tmp / "with")
    works("reconstruct", tmp / "with", "run-a", "-o", tmp / "again")


@follows("--allow-partial leaves such tensors out, and lists them")
def _partial(tmp: Path) -> None:
    base, moved = model(tmp / "base", a=W, norm=torch.ones(2)), model(tmp / "run", a=W * 2, norm=torch.zeros(2))
    arguments = ("merge", base, moved, "--method", "mean", "--as-lora", "2", "-o", tmp / "out")
    assert refused(*arguments).endswith("--allow-partial leaves such tensors out, and lists them")
    assert "norm" in works(*arguments, "--allow-partial")


@follows("end it with an entry without filter")
def _filter(tmp: Path) -> None:
    arguments, entry = ("merge", *three(tmp), "--method", "mean", "-o", tmp / "out"), "{filter: a.weight, value: 3}"
    assert refused(*arguments, "--set", f"weights=[[{entry}], 1]").endswith("end it with an entry without filter")
    works(*arguments, "--set", f"weights=[[{entry}, {{value: 1}}], 1]")
    merged = load_file(tmp / "out/model.safetensors")
    torch.testing.assert_close(merged["a.weight"], (3 * W * 2 + W * 3) / 4)
    torch.testing.assert_close(merged["b.weight"], W)


@follows("set trim: tensor, or one density for all tensors")
def _one_threshold(tmp: Path) -> None:
    several, trim = "density=[{filter: a.weight, value: 0.5}, {value: 0.8}]", ("--set", "trim=global")
    arguments = ("merge", *three(tmp), "--method", "ties", "--set")
    assert refused(*arguments, several, *trim, "-o", tmp / "out").endswith("set trim: tensor, or one density for all tensors")
    works(*arguments, several, "--set", "trim=tensor", "-o", tmp / "tensor")
    works(*arguments, "density=0.5", *trim, "-o", tmp / "global")


@follows("give both the same tokens first: model.resize_token_embeddings({}) in transformers")
def _more_tokens(tmp: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, run_a = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=rows)) for rows in (16, 19))
    base.save_pretrained(tmp / "base")
    run_a.save_pretrained(tmp / "run")
    arguments = ("merge", tmp / "base", tmp / "run", "--method", "mean", "-o", tmp / "out")
    assert refused(*arguments).endswith("model.resize_token_embeddings(19) in transformers")
    base.resize_token_embeddings(19)
    base.save_pretrained(tmp / "base")
    works(*arguments)


@follows("leave this run out")
def _broken_run(tmp: Path) -> None:
    base, run_a, _ = three(tmp)
    broken = model(tmp / "broken", a=W * torch.nan, b=W)
    for method in ("mean", "ties", "dare-linear"):  # with kernels and without
        arguments = ("merge", base, run_a)
        assert refused(*arguments, broken, "--method", method, "-o", tmp / method).endswith("leave this run out")
        works(*arguments, "--method", method, "-o", tmp / method)
    start, *runs = [MemoryCheckpoint({"a": W + i}, source=f"{i}") for i in range(3)]
    losses = {"1": float("nan"), "2": 0.1}
    options = {"method": "metrics-weighted", "held_out_loss": lambda checkpoint: losses[checkpoint.source]}
    with pytest.raises(BadInput, match="leave this run out"):
        merge(start, runs, **options)
    assert merge(start, runs[1:], **options)["a"].tolist() == runs[1]["a"].tolist()


@follows("use greedy-soup")
def _negative(tmp: Path) -> None:
    base, one, two = (MemoryCheckpoint({"a": W + i}, source=f"{i}") for i in range(3))

    def loss(checkpoint: Checkpoint) -> float:
        return -float(checkpoint["a"].sum())

    with pytest.raises(BadInput, match="use greedy-soup"):
        merge(base, [one, two], method="metrics-weighted", held_out_loss=loss)
    assert merge(base, [one, two], method="greedy-soup", held_out_loss=loss)["a"].tolist() == two["a"].tolist()


@follows("name a file for each run: `information`")
def _information(tmp: Path) -> None:
    arguments = ("merge", *three(tmp), "--method", "fisher", "-o", tmp / "out")
    assert refused(*arguments).endswith("name a file for each run: `information`")
    files = [str(tmp / f"fisher-{name}.safetensors") for name in "ab"]
    for file in files:
        save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, file)
    works(*arguments, "--set", f"information={yaml.safe_dump(files, default_flow_style=True)}")


@follows("give a recipe with `--recipe`", "give a recipe with --recipe")
def _needs_data(tmp: Path) -> None:
    """The option itself is followed in test_advice_recipes.py, where there is a base that a recipe can measure."""
    arguments = ("merge", *three(tmp), "--method")
    assert refused(*arguments, "greedy-soup", "-o", tmp / "out").endswith("give a recipe with `--recipe`")
    assert refused(*arguments, "mean", "--reestimate", "-o", tmp / "out").endswith("give a recipe with --recipe")


@follows("leave that out")
def _repeated(tmp: Path) -> None:
    base, *runs = three(tmp)
    works("merge", base, *runs, "--method", "mean", "-o", tmp / "out")
    again = ("merge", "--again", tmp / "out", "-o", tmp / "again")
    assert refused(*again, "--method", "ties").endswith("leave that out")
    works(*again)
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [
        {"model": str(run), "parameters": {"weight": 0.5}} for run in runs]}  # fmt: skip
    (tmp / "config.yaml").write_text(yaml.safe_dump(config))
    configured = ("merge", "--config", tmp / "config.yaml", "-o", tmp / "configured")
    assert refused(*configured, "--method", "ties").endswith("leave that out")
    works(*configured)


@follows("bake it first")
def _adapters_of_mergekit(tmp: Path) -> None:
    base, run_a, run_b = three(tmp)
    lora = adapter(tmp / "adapter")
    works("bake", run_b, lora, "-o", tmp / "baked")
    for ours, models in (
        ({"base_model": f"{base}+{lora}"}, [run_a, run_b]),
        ({"base_model": str(base)}, [run_a, f"{run_b}+{lora}"]),
    ):
        config = {"merge_method": "task_arithmetic", **ours, "models": [
            {"model": str(each), "parameters": {"weight": 0.5}} for each in models]}  # fmt: skip
        (tmp / "config.yaml").write_text(yaml.safe_dump(config))
        arguments = ("merge", "--config", tmp / "config.yaml", "-o", tmp / "out", "--force")
        assert refused(*arguments).endswith("bake it first")
        works("bake", base, lora, "-o", tmp / "baked-base", "--force")
        text = yaml.safe_dump(config).replace(f"{base}+{lora}", str(tmp / "baked-base"))
        (tmp / "config.yaml").write_text(text.replace(f"{run_b}+{lora}", str(tmp / "baked")))
        works(*arguments)


@follows("give all {} runs one: --weight, {} times")
def _weights(tmp: Path) -> None:
    base, run_a, run_b = three(tmp)
    works("merge", base, run_a, "--weight", "2", "--method", "mean", "-o", tmp / "one")
    extend = ("merge", "--extend", tmp / "one", run_b, "-o", tmp / "two")
    assert refused(*extend).endswith("give all 2 runs one: --weight, 2 times")
    works(*extend, "--weight", "2", "--weight", "1")


@follows("merge all runs from scratch")
def _files_of_runs(tmp: Path) -> None:
    base, run_a, run_b = three(tmp)
    fishers = [str(tmp / f"fisher-{name}.safetensors") for name in "ab"]
    for file in fishers:
        save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, file)
    fisher = ("--method", "fisher", "--set")
    works("merge", base, run_a, *fisher, f"information=['{fishers[0]}']", "-o", tmp / "one")
    assert refused("merge", "--extend", tmp / "one", run_b, "-o", tmp / "two").endswith("merge all runs from scratch")
    works("merge", base, run_a, run_b, *fisher, f"information={fishers}", "-o", tmp / "two")


@follows("restore it, or merge from scratch", "merge from scratch")
def _changed_input(tmp: Path) -> None:
    base, *runs = three(tmp)
    works("merge", base, *runs, "--method", "mean", "-o", tmp / "out")
    again = ("merge", "--again", tmp / "out", "-o", tmp / "again")
    shutil.copytree(runs[0], tmp / "kept")
    model(runs[0], a=W * 7, b=W)
    assert refused(*again).endswith("restore it, or merge from scratch")
    works("merge", base, *runs, "--method", "mean", "-o", tmp / "scratch")
    shutil.copytree(tmp / "kept", runs[0], dirs_exist_ok=True)
    works(*again)
    record = tmp / "out/merge.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_sha256": {}}))
    assert refused("merge", "--again", tmp / "out", "-o", tmp / "third").endswith("merge from scratch")
    works("merge", base, *runs, "--method", "mean", "-o", tmp / "third")


@follows("give --format {}")
def _format(tmp: Path) -> None:
    base, run = model(tmp / "base"), model(tmp / "run", a=W + torch.ones(2, 2))
    lora = ("merge", base, run, "--method", "mean", "--as-lora", 1, "-o", tmp / "out", "--format")
    assert refused(*lora, "kohya").endswith("give --format peft")
    works(*lora, "peft")


@pytest.mark.parametrize("scenario", SCENARIOS.each())
def test_following_the_advice_succeeds(scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenario(tmp_path)
