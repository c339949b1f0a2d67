"""Following the advice of messages about recipes, their data and the output folders of `emomerge run`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from advising import Scenario, Scenarios, adapter, model, refused, run, works
from PIL import Image

import emomerge
from emomerge.checkpoints import open_checkpoint
from emomerge.errors import BadInput
from emomerge.recipe import Base, load_recipe, parse_recipe
from emomerge.tasks import make_task

SCENARIOS = Scenarios()
follows = SCENARIOS.follows
TINY: dict[str, Any] = {
    "name": "tiny",
    "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4, "steps": 3, "learning_rate": 0.01}},
    "task": {"kind": "image-classification", "train": "digits", "limit": 160, "eval_fraction": 0.5},
    "adapter": {"kind": "lora", "rank": 2, "alpha": 4},
    "runs": {"optimizers": ["sens", "cats"], "procedure": "paper", "preset": "guarded", "steps": 2, "batch_size": 8},
    "merge": [{"method": "mean"}],
    "controls": [],
    "probe": {"preset": "quick", "batches": 1, "batch_size": 32, "directions": 2},
}


def written(file: Path, **sections: Any) -> Path:
    """Write the recipe with some sections changed."""
    changed = {key: {**TINY[key], **value} if isinstance(value, dict) else value for key, value in sections.items()}
    file.write_text(yaml.safe_dump(TINY | changed))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The recipe in a folder of its own, beside its finished output `out`."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    works("run", written(folder / "tiny.yaml"), "--quiet", "-o", folder / "out")
    yield folder


def task(section: dict[str, Any], base: dict[str, Any] | None = None) -> Any:
    recipe = parse_recipe({**TINY, "task": section, **({"base": base} if base else {})})
    made = make_task(recipe.task)
    return made.load_data(recipe.base)


def rows(file: Path, *some: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    return file


# Recipes


@follows("start from one with `emomerge init`")
def _no_recipe(tmp: Path) -> None:
    assert refused("run", tmp / "recipe.yaml").endswith("start from one with `emomerge init`")
    works("init", "digits", "-o", tmp / "recipe.yaml")
    assert emomerge.recipe.load_recipe(tmp / "recipe.yaml").name == "digits"


@follows("set base.model in the recipe that init writes")
def _init_with_base(tmp: Path) -> None:
    assert refused("init", "digits", "--base", "out/base").endswith("set base.model in the recipe that init writes")
    works("init", "digits", "-o", tmp / "recipe.yaml")
    assert load_recipe(tmp / "recipe.yaml", ["base={model: some/model}"]).base.model == "some/model"


@follows("known keys: {}")
def _unknown_key(tmp: Path) -> None:
    file = tmp / "recipe.yaml"
    file.write_text(yaml.safe_dump(TINY | {"zzzzzzzz": 1}))
    known = refused("run", file).rpartition("known keys: ")[2].split(", ")
    file.write_text(yaml.safe_dump(TINY | {known[known.index("device")]: "cpu"}))
    assert load_recipe(file).device == "cpu"


@follows("bake it into its base first: `emomerge bake`")
def _adapter_as_base(tmp: Path) -> None:
    from emomerge.tasks.pretrained import _location

    base, lora = model(tmp / "base"), adapter(tmp / "adapter")
    with pytest.raises(BadInput, match="bake it into its base first"):
        _location(Base(model=str(lora)))
    works("bake", base, lora, "-o", tmp / "baked")
    assert _location(Base(model=str(tmp / "baked"))) == str(tmp / "baked")


@follows("use auto or cpu")
def _device(tmp: Path) -> None:
    train = ("train-all", "tiny.yaml", "--quiet", "--only", "sens", "-o", tmp / "out", "--set")
    assert refused(*train, "device=mps").endswith("use auto or cpu")
    for device in ("auto", "cpu"):
        works(*train, f"device={device}", "--set", f"name={device}", "-o", tmp / device)


@follows("leave out --only, or set runs.optimizers")
def _only(tmp: Path) -> None:
    train = ("train-all", "tiny.yaml", "--quiet", "--set", "runs.rounds=2", "--set", "runs.preset=auto", "-o")
    assert refused(*train, tmp / "out", "--only", "sens").endswith("leave out --only, or set runs.optimizers")
    works(*train, tmp / "all")
    works(*train, tmp / "one", "--set", "runs.optimizers=[sens]")


@follows("leave out `of`, or give {}")
def _rounds(tmp: Path) -> None:
    from emomerge.experiment.merges import check_merge

    def check(**merge: Any) -> None:
        recipe = parse_recipe({**TINY, "runs": {**TINY["runs"], "rounds": 2, "keep_rounds": 2}, "merge": [merge]})
        for spec in recipe.merge:
            check_merge(recipe, spec)

    with pytest.raises(BadInput, match="leave out `of`, or give `information`"):
        check(method="fisher", of="rounds")
    check(method="fisher")
    check(method="fisher", of="rounds", information=["a.safetensors", "b.safetensors"])


@follows("use runs.parallel: auto", "use runs.parallel: auto, or no executor")
def _stacked(tmp: Path) -> None:
    stacked = ("--set", "runs.parallel=stacked")
    whole = ("train-all", "tiny.yaml", "--quiet", "--set", "adapter={kind: full}", "-o", tmp / "full")
    assert refused(*whole, *stacked).endswith("use runs.parallel: auto")
    works(*whole, "--set", "runs.parallel=auto")
    train = ("train-all", "tiny.yaml", "--quiet", "-o", tmp / "out")
    assert refused(*train, *stacked, "--max-parallel", "2").endswith("use runs.parallel: auto, or no executor")
    works(*train, *stacked)


@follows("use one of them")
def _torchrun(tmp: Path) -> None:
    """`torchrun` itself is tried in training/test_ranks.py."""
    import emomerge.training
    from emomerge.training.ranks import Ranks

    train = ("train-all", "tiny.yaml", "--quiet", "-o", tmp / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emomerge.training, "join_ranks", lambda: Ranks(0, 2))
        assert refused(*train, "--max-parallel", "2").endswith("use one of them")
    works(*train)


@follows("pip install 'emomerge[ray]'", "pip install 'emomerge[slurm]'", "pip install {}")
def _not_installed(tmp: Path) -> None:
    """What is installed is used: training/test_clusters.py trains by both, training/test_tracking.py logs to trackers."""
    import accelerate.tracking

    from emomerge.training.tracking import check_trackers

    train = ("train-all", "tiny.yaml", "--quiet", "-o", tmp / "out", "--executor")
    for name, module in {"ray": "ray", "slurm": "submitit"}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert refused(*train, name).endswith(f"pip install 'emomerge[{name}]'")
    for available in ([], ["tensorboard"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accelerate.tracking, "get_available_trackers", lambda available=available: available)
            if available:
                check_trackers(["tensorboard"])
                continue
            with pytest.raises(BadInput, match="pip install tensorboard"):
                check_trackers(["tensorboard"])


# Output folders


@follows("choose another -o")
def _not_ours(tmp: Path) -> None:
    (tmp / "file").write_text("")
    (tmp / "other/base").mkdir(parents=True)
    (tmp / "strange").mkdir()
    (tmp / "strange/x").write_text("")
    train = ("train-all", "tiny.yaml", "--quiet", "-o")
    for place, more in (("file", ()), ("other", ()), ("strange", ("--restart",))):
        command = ("run", *train[1:]) if more else train
        assert refused(*command, tmp / place, *more).endswith("choose another -o"), place
    inside = ("--set", f"base={{model: {tmp / 'inside/model'}}}")
    shutil.copytree("out/base", tmp / "inside/model")
    assert refused(*train, tmp / "inside", *inside).endswith("choose another -o")
    probe = ("probe", "tiny.yaml", "--quiet", "--base", "out/base", "--metric", "gaussian", "out/merges/mean", "-o")
    message = run(*probe, "out")
    assert message.exit_code == 2 and message.output.strip().endswith("choose another -o"), message.output
    works(*probe, tmp / "probed")
    works(*train, tmp / "trained", *inside)


@follows("choose another -o, or delete what is there with `emomerge run --restart`")
def _of_another_recipe(tmp: Path) -> None:
    other = ("run", "tiny.yaml", "--quiet", "--set", "name=other", "-o")
    assert refused(*other, "out").endswith("or delete what is there with `emomerge run --restart`")
    works("train-all", *other[1:], tmp / "another")
    works(*other, "out", "--restart")


@follows("wait for it, or choose another -o")
def _busy(tmp: Path) -> None:
    from emomerge.experiment.workspace import Workspace

    train = ("train-all", "tiny.yaml", "--quiet", "-o")
    with Workspace(tmp / "out").locked():
        assert refused(*train, tmp / "out").endswith("wait for it, or choose another -o")
        works(*train, tmp / "another")
    works(*train, tmp / "out")


@follows("run the recipe again; its evaluations are remembered", "run the recipe to its end first")
def _results(tmp: Path) -> None:
    results = Path("out/results.json")
    whole = results.read_text()
    for damaged, advice in ((whole[:-20], "its evaluations are remembered"), (None, "run the recipe to its end first")):
        results.unlink()
        if damaged:
            results.write_text(damaged)
        assert refused("report", "out").endswith(advice)
        works("run", "tiny.yaml", "--quiet", "-o", "out")
        works("report", "out")


@follows("delete that file and run the recipe again; its evaluations are remembered")
def _results_without_rows(tmp: Path) -> None:
    results = Path("out/results.json")
    whole = json.loads(results.read_text())
    results.write_text(json.dumps({key: value for key, value in whole.items() if key != "held_out"}))
    shutil.copytree("out", tmp / "other")
    compared = ("report", "out", tmp / "other", "-o", tmp / "page.html")
    message = refused(*compared)
    assert message.endswith("delete that file and run the recipe again; its evaluations are remembered")
    for folder in ("out", tmp / "other"):
        (Path(folder) / "results.json").unlink()
        works("run", "tiny.yaml", "--quiet", "-o", folder)
    works(*compared)


@follows("give their recipes the same data, split and probe.batch_size")
def _other_rows(tmp: Path) -> None:
    other = ("run", "tiny.yaml", "--quiet", "-o")
    works(*other, tmp / "other", "--set", "task.limit=150")
    compared = ("report", "out", tmp / "other", "-o", tmp / "page.html")
    assert refused(*compared).endswith("give their recipes the same data, split and probe.batch_size")
    works(*other, tmp / "same", "--set", "runs.seeds=[1]")
    works("report", "out", tmp / "same", "-o", tmp / "page.html")


@follows("name the model itself, such as one in its folder merges")
def _nothing_recommended(tmp: Path) -> None:
    results = Path("out/results.json")
    whole = json.loads(results.read_text())
    results.write_text(json.dumps({**whole, "selected": {**whole["selected"], "kind": "nothing"}}))
    push = ("me/model", "--dry-run")
    assert refused("push", "out", *push).endswith("name the model itself, such as one in its folder merges")
    works("push", "out/merges/mean", *push)


@follows("name one")
def _no_output(tmp: Path) -> None:
    (tmp / "state").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp / "state"))
        patch.chdir(tmp / "state")
        assert refused("status").endswith("name one")
    works("status", "out")


@follows("merge again with --restart")
def _damaged_merge(tmp: Path) -> None:
    record = Path("out/merges/mean/merge.json")
    data = record.read_bytes()
    record.write_bytes(b"[" + b" " * (len(data) - 1))  # of the same size
    Path("out/stamps/probe.json").unlink()
    arguments = ("run", "tiny.yaml", "--quiet", "-o", "out")
    assert refused(*arguments).endswith("merge again with --restart")
    works(*arguments, "--restart")


@follows("finish it first")
def _unfinished(tmp: Path) -> None:
    state = Path("out/runs/sens-0/run.json")
    fields = json.loads(state.read_text())
    state.write_text(json.dumps({key: value for key, value in fields.items() if key != "artefact"} | {"state": "waiting"}))
    merge = ("merge", "out/base", "out/runs/sens-0", "--method", "mean", "-o", tmp / "merged")
    assert refused(*merge).endswith("finish it first")
    works("train-all", "tiny.yaml", "--quiet", "-o", "out")
    works(*merge)


@follows("delete it to train this run from scratch")
def _checkpoints(tmp: Path) -> None:
    train = ("train-all", "tiny.yaml", "--quiet", "--set", "runs.parallel=sequential", "-o", tmp / "out")
    rounds = ("--set", "runs.rounds=2", "--set", "runs.preset=auto")
    works(*train, *rounds)
    run_folder = tmp / "out/runs/sens-0"
    state = json.loads((run_folder / "run.json").read_text())
    checkpoint = run_folder / "checkpoint.safetensors"
    (run_folder / "run.json").write_text(json.dumps(state | {"state": "running", "step": 1}))
    checkpoint.write_bytes(b"damaged")
    assert run(*train, *rounds).output.strip().endswith("delete it to train this run from scratch")
    checkpoint.unlink()
    works(*train, *rounds)


@follows("run the same command again")
def _start_gone(tmp: Path) -> None:
    from emomerge.training import rounds

    train = ("train-all", "tiny.yaml", "--quiet", "--set", "runs.trunk=0.5", "--set", "runs.preset=auto", "-o", tmp / "out")
    trunks = rounds.train_trunks

    def without(*arguments: Any) -> None:
        trunks(*arguments)
        (tmp / "out/runs/start-0.safetensors").unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "train_trunks", without)
        assert run(*train).output.strip().endswith("run the same command again")
    works(*train)


@follows("put it back; the same command resumes")
def _base_gone(tmp: Path) -> None:
    from emomerge.training import execute

    train = (
        "train-all",
        "tiny.yaml",
        "--quiet",
        "--set",
        "adapter={kind: full}",
        "--set",
        "runs.parallel=sequential",
        "-o",
        tmp / "out",
    )
    works(*train, "--only", "cats")
    base, kept = tmp / "out/base", tmp / "kept"
    trained = execute.train_run

    def without(*arguments: Any, **options: Any) -> Any:
        given = arguments[2]

        def moved(spec: Any, row: Any) -> None:
            given(spec, row)
            if base.exists():
                base.rename(kept)

        return trained(arguments[0], arguments[1], moved, *arguments[3:], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "train_run", without)
        assert refused(*train).endswith("put it back; the same command resumes")
    kept.rename(base)
    works(*train)


# Data


@follows("set task.columns")
def _columns(tmp: Path) -> None:
    some = [{"a": f"word {n}", "b": "xy"[n % 2]} for n in range(20)]
    section = {"kind": "causal-lm", "train": str(rows(tmp / "rows.jsonl", *some))}
    base = {"prepare": {"model": "llama", "hidden": 32, "layers": 1, "vocabulary": 300}}
    with pytest.raises(BadInput, match="set task.columns"):
        task(section, base)
    task(section | {"columns": {"text": "a"}, "max_length": 32}, base)


@follows("leave task.columns out", "give `base.model`")
def _text(tmp: Path) -> None:
    (tmp / "text.txt").write_text("the cat sat on the mat\n\n" * 30)
    base = {"prepare": {"model": "llama", "hidden": 32, "layers": 1, "vocabulary": 300}}
    section = {"kind": "causal-lm", "train": str(tmp / "text.txt"), "max_length": 32}
    with pytest.raises(BadInput, match="leave task.columns out"):
        task(section | {"columns": {"text": "text"}}, base)
    task(section, base)
    chats = {"columns": {"messages": "messages"}, "train": str(rows(tmp / "chats.jsonl", *[{"messages": CHAT[:2]}] * 20))}
    with pytest.raises(BadInput, match=r"give `base.model`"):
        task(section | chats, base)
    task(section | chats, {"model": str(language_model(tmp / "llama", TEMPLATE))})


CHAT = [{"role": role, "content": text} for role, text in (("user", "cat"), ("assistant", "sat")) * 2]
TURN = "{{ '<' + m.role + '> ' + m.content + ' <|end|>' }}"
TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
FORGETFUL = f"{{% for m in messages %}}{{% if loop.last or m.role == 'user' %}}{TURN}{{% endif %}}{{% endfor %}}"


def language_model(folder: Path, template: str | None = None, kind: str = "Llama") -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: n for n, word in enumerate(["<|end|>", "<pad>", "<unk>", "<user>", "<assistant>", "cat", "sat", "on", "the"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<pad>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(str(folder))
    sizes = {"Llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
             "Bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 2}}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(words), eos_token_id=0, bos_token_id=None, **sizes[kind])
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(str(folder))
    return folder


@follows("give each assistant's turn a row of its own")
def _turns(tmp: Path) -> None:
    base = {"model": str(language_model(tmp / "llama", FORGETFUL))}
    section = {"kind": "causal-lm", "columns": {"messages": "messages"}, "max_length": 32}
    with pytest.raises(BadInput, match="give each assistant's turn a row of its own"):
        task(section | {"train": str(rows(tmp / "whole.jsonl", *[{"messages": CHAT}] * 20))}, base)
    task(section | {"train": str(rows(tmp / "apart.jsonl", *[{"messages": CHAT[:2]}] * 20))}, base)


@follows("set task.packing to joined or none")
def _packing(tmp: Path) -> None:
    base = Base(model=str(language_model(tmp / "bloom", kind="Bloom")))
    source = rows(tmp / "rows.jsonl", *[{"text": "the cat sat on the cat"}] * 20)
    for packing in ("separate", "joined", "none"):
        section = {"kind": "causal-lm", "train": str(source), "max_length": 16, "packing": packing}
        made = make_task(parse_recipe({**TINY, "task": section, "base": {"model": base.model}}).task)
        data = made.load_data(base)
        if packing == "separate":
            with pytest.raises(BadInput, match="set task.packing to joined or none"):
                made.new_model(base, data)
        else:
            made.new_model(base, data)


@follows("raise task.limit, or give the class more rows")
def _classes(tmp: Path) -> None:
    section = {**TINY["task"], "limit": 12}
    with pytest.raises(BadInput, match=r"raise task\.limit, or give the class more rows"):
        task(section)
    task({**section, "limit": 400})
    few = {"kind": "image-classification", "train": str(tmp / "few"), "eval_fraction": 0.5}
    for label in "abcdef":
        images(tmp / "few" / label, 12 if label == "a" else 1)
    with pytest.raises(BadInput, match="give the class more rows"):
        task(few)
    for label in "bcdef":
        images(tmp / "few" / label, 12)
    task(few)


def images(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new("L", size, n * 20).save(folder / f"{n}.png")


@follows("set task.image_size")
def _image_size(tmp: Path) -> None:
    for label in "ab":
        images(tmp / "train" / label, 12, (12, 8))
    section = {"kind": "image-classification", "train": str(tmp / "train"), "eval_fraction": 0.5}
    with pytest.raises(BadInput, match=r"set task\.image_size"):
        task(section)
    task(section | {"image_size": 8})


# Measuring merges


@follows("leave it out")
def _always_measured(tmp: Path) -> None:
    probe = (
        "probe",
        "tiny.yaml",
        "--quiet",
        "--base",
        "out/base",
        "out/merges/mean",
        "--metric",
        "gaussian",
        "-o",
        tmp / "probed",
    )
    assert run(*probe, "--metric", "loss").output.strip().endswith("leave it out")
    works(*probe)


@follows("leave that option out")
def _no_batch_norm(tmp: Path) -> None:
    merge = ("merge", "out/base", "out/runs/sens-0", "out/runs/cats-0", "--recipe", "tiny.yaml", "-o", tmp / "out", "--method")
    assert refused(*merge, "mean", "--reestimate").endswith("leave that option out")
    works(*merge, "mean")


@follows("give a recipe with `--recipe`", "give a recipe with --recipe")
def _needs_data(tmp: Path) -> None:
    merge = ("merge", "out/base", "out/runs/sens-0", "out/runs/cats-0", "--method")
    assert refused(*merge, "greedy-soup", "-o", tmp / "out").endswith("give a recipe with `--recipe`")
    assert refused(*merge, "mean", "--reestimate", "-o", tmp / "out").endswith("give a recipe with --recipe")
    works(*merge, "greedy-soup", "--recipe", "tiny.yaml", "-o", tmp / "out")
    assert len(open_checkpoint(tmp / "out")) == len(open_checkpoint("out/base"))


@pytest.mark.parametrize("scenario", SCENARIOS.each())
def test_following_the_advice_succeeds(
    scenario: Scenario, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(finished, here)
    monkeypatch.chdir(here)
    scenario(tmp_path)
