"""What an error message advises works: each scenario meets the error, does what it says, and succeeds."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import emomerge
from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint, write_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.optim import EmoPulseLR, EmoSens

Scenario = Callable[[Path], None]
SCENARIOS: dict[str, Scenario] = {}
W = torch.arange(4.0).view(2, 2) + 1


def follows(*advice: str) -> Callable[[Scenario], Scenario]:
    """Register a scenario for the advice that it follows, as the source gives it, with `{}` for what is filled in."""

    def register(scenario: Scenario) -> Scenario:
        SCENARIOS.update(dict.fromkeys(advice, scenario))
        return scenario

    return register


def text_of(node: ast.expr) -> Iterator[str]:
    """Yield the texts that an expression for `fix` can give."""
    match node:
        case ast.Constant(value=str() as text):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.IfExp(body=yes, orelse=no):
            yield from (*text_of(yes), *text_of(no))
        case ast.BoolOp(values=values):
            for value in values:
                yield from text_of(value)
        case ast.Name(id=name) if name.isupper():
            yield name


def all_advice() -> set[str]:
    """Return every text that the package passes as `fix`."""
    package = Path(emomerge.__file__).parent
    calls = [
        node for file in package.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    return {text for call in calls for keyword in call.keywords if keyword.arg == "fix" for text in text_of(keyword.value)}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.output.strip().splitlines()[-1]


def works(*arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output


def model(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{name}.weight": tensor.clone() for name, tensor in (tensors or {"a": W}).items()}, folder / "model.safetensors"
    )
    return folder


def adapter(folder: Path, module: str = "a") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]})
    )
    names = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
    save_file({f"base_model.model.{module}.{n}.weight": t for n, t in names.items()}, folder / "adapter_model.safetensors")
    return folder


@follows("UNQUANTIZED")
def _unquantized(tmp: Path) -> None:
    whole, quantized = model(tmp / "whole"), tmp / "quantized"
    quantized.mkdir()
    save_file({"a.qweight": torch.ones(2, 2, dtype=torch.int32), "a.g_idx": torch.ones(2)}, quantized / "model.safetensors")
    (tmp / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    for base in (quantized, tmp / "a.gguf"):
        assert refused("bake", base, tmp, "-o", tmp / "out").endswith("that it was quantized from")
    works("bake", whole, adapter(tmp / "adapter"), "-o", tmp / "out")


@follows("_TO_CONVERT")
def _pickle(tmp: Path) -> None:
    import safetensors.torch

    tied = {"a.weight": W, "b.weight": W}
    torch.save(tied, tmp / "pytorch_model.bin")
    message = refused("inspect", tmp)
    code = message.partition("where you trust it: ")[2].replace("'model.safetensors'", repr(str(tmp / "model.safetensors")))
    exec(code, {"safetensors": safetensors, "torch": torch, "file": tmp / "pytorch_model.bin"})
    works("inspect", tmp)


@follows("name the file you mean")
def _several(tmp: Path) -> None:
    for name in ("one", "two"):
        save_file({"a.weight": W}, tmp / f"{name}.safetensors")
    assert refused("inspect", tmp).endswith("name the file you mean")
    works("inspect", tmp / "one.safetensors")
    for name in ("one", "two"):
        (tmp / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": f"{name}.safetensors"}}))
    assert refused("inspect", tmp).endswith("name the file you mean")
    works("inspect", tmp / "one.safetensors.index.json")


@follows("check the path")
def _no_path(tmp: Path) -> None:
    assert refused("inspect", tmp / "folder/none").endswith("check the path")
    works("inspect", model(tmp / "folder/none"))


@follows("choose another path or give --force")
def _exists(tmp: Path) -> None:
    base = model(tmp / "base")
    out = model(tmp / "out")
    arguments = ("merge", base, base, "--method", "mean", "-o")
    assert refused(*arguments, out).endswith("choose another path or give --force")
    works(*arguments, tmp / "another")
    works(*arguments, out, "--force")


@follows("choose another path")
def _another(tmp: Path) -> None:
    base = model(tmp / "base")
    (tmp / "file").write_text("")
    arguments = ("merge", base, base, "--method", "mean", "-o")
    assert refused(*arguments, tmp / "file/out").endswith("choose another path")
    works(*arguments, tmp / "out")


@follows("exchange them: {} {}", "name its base first: emomerge bake BASE ADAPTER")
def _exchanged(tmp: Path) -> None:
    base, lora = model(tmp / "base"), adapter(tmp / "adapter")
    message = refused("bake", lora, base, "-o", tmp / "out")
    works("bake", *message.rpartition("exchange them: ")[2].split(), "-o", tmp / "out")
    assert refused("merge", lora, base, "-o", tmp / "merged").endswith("emomerge bake BASE ADAPTER")
    works("merge", base, lora, "--method", "mean", "-o", tmp / "merged")


@follows("name two paths")
def _one_path(tmp: Path) -> None:
    base = model(tmp / "base")
    assert refused("inspect", base, "--base", base).endswith("name two paths")
    works("inspect", base, base, "--base", base)


@follows("write `--set {}=VALUE`")
def _set(tmp: Path) -> None:
    base = model(tmp / "base")
    assert "write `--set k=VALUE`" in refused("merge", base, base, base, "--method", "ties", "--k", "2", "-o", tmp / "out")
    works("merge", base, base, base, "--method", "ties", "--set", "density=0.5", "-o", tmp / "out")


@follows("merge with --save-masks")
def _masks(tmp: Path) -> None:
    base, run_a = model(tmp / "base"), model(tmp / "run-a", a=W * 2)
    arguments = ("merge", base, run_a, run_a, "--method", "tall-mask")
    works(*arguments, "-o", tmp / "without")
    assert refused("reconstruct", tmp / "without", "run-a", "-o", tmp / "again").endswith("merge with --save-masks")
    works("merge", base, run_a, model(tmp / "run-b", a=W * 3), "--method", "tall-mask", "--save-masks", "-o", tmp / "with")
    works("reconstruct", tmp / "with", "run-a", "-o", tmp / "again")


@follows("--allow-partial leaves such tensors out, and lists them")
def _partial(tmp: Path) -> None:
    base = model(tmp / "base", a=W, norm=torch.ones(2))
    moved = model(tmp / "run", a=W * 2, norm=torch.zeros(2))
    arguments = ("merge", base, moved, "--method", "mean", "--as-lora", "2", "-o", tmp / "out")
    assert refused(*arguments).endswith("--allow-partial leaves such tensors out, and lists them")
    works(*arguments, "--allow-partial")


@follows("write it as bfloat16 or float32", "check the run that it comes from")
def _overflow(tmp: Path) -> None:
    large = MemoryCheckpoint({"a": torch.tensor([1e6])})
    with pytest.raises(BadInput, match="write it as bfloat16 or float32"):
        write_checkpoint(large, tmp / "half", dtype="float16")
    for dtype in ("bfloat16", "float32"):
        write_checkpoint(large, tmp / dtype, dtype=dtype)
    run_a = model(tmp / "run", a=W * torch.nan)
    with pytest.raises(BadInput, match="check the run that it comes from"):
        write_checkpoint(open_checkpoint(run_a), tmp / "nan")
    assert load_file(run_a / "model.safetensors")["a.weight"].isnan().all()


@follows("bake it into its base first: `emomerge bake`")
def _adapter_as_base(tmp: Path) -> None:
    from emomerge.recipe import Base
    from emomerge.tasks.pretrained import _location

    base, lora = model(tmp / "base"), adapter(tmp / "adapter")
    with pytest.raises(BadInput, match="bake it into its base first"):
        _location(Base(model=str(lora)))
    works("bake", base, lora, "-o", tmp / "baked")
    assert _location(Base(model=str(tmp / "baked"))) == str(tmp / "baked")


@follows("start from one with `emomerge init`")
def _no_recipe(tmp: Path) -> None:
    assert refused("run", tmp / "recipe.yaml").endswith("start from one with `emomerge init`")
    works("init", "digits", "-o", tmp / "recipe.yaml")
    assert emomerge.recipe.load_recipe(tmp / "recipe.yaml").name == "digits"


@follows("average it first, as in `loss.mean()`")
def _vector_loss(tmp: Path) -> None:
    optimizer = EmoSens([torch.nn.Parameter(W.clone())])
    with pytest.raises(BadInput, match="average it first"):
        optimizer.observe(W)
    optimizer.observe(W.mean())


@follows("give `divided` the same value for every micro-batch")
def _divided(tmp: Path) -> None:
    optimizer = EmoSens([torch.nn.Parameter(W.clone())])
    optimizer.observe(1.0, divided=True)
    with pytest.raises(BadInput, match="the same value for every micro-batch"):
        optimizer.observe(1.0)
    optimizer.observe(1.0, divided=True)


@follows("use its own `pulse`")
def _own_pulse(tmp: Path) -> None:
    optimizer = EmoSens([torch.nn.Parameter(W.clone())])
    with pytest.raises(BadInput, match="use its own `pulse`"):
        EmoPulseLR(optimizer)
    assert optimizer.pulse.rate > 0


@pytest.mark.parametrize("advice", sorted(SCENARIOS))
def test_following_the_advice_succeeds(advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SCENARIOS[advice](tmp_path)


def test_all_advice_is_known() -> None:
    """A new `fix` needs a scenario; `WITHOUT_SCENARIO` only shrinks."""
    found, with_scenario = all_advice(), set(SCENARIOS)
    assert with_scenario <= found, "a scenario follows advice that nothing gives"
    assert found - with_scenario == WITHOUT_SCENARIO, "advice without a scenario, or an entry that is no longer needed"


WITHOUT_SCENARIO = {
    "after replacing `.data` of a parameter, create the optimizer again",
    "bake into the unquantized base",
    "bake it first",
    "check the spelling, the connection (HF_HUB_OFFLINE) and, for a gated model, that you are logged in",
    "choose another -o",
    "delete it to train this run from scratch",
    "did you mean {}?",
    "download it again",
    "download or write it again",
    "end it with an entry without filter",
    "finish it first",
    "give `base.model`",
    "give a name without .safetensors",
    "give a recipe with --recipe",
    "give a recipe with `--recipe`",
    "give all {} runs one: --weight, {} times",
    "give each assistant's turn a row of its own",
    "give the base that the adapter was trained on",
    "give {}",
    "if you trust it, load it in PEFT and save_pretrained",
    "leave it out",
    "leave out --only, or set runs.optimizers",
    "leave task.columns out",
    "leave that option out",
    "leave that out",
    "leave the ledger out",
    "leave this run out",
    "load the model in float32",
    "load the model in float32, or take larger radii",
    "load the model without offloading",
    "load the state that {} saved for this model",
    "merge again with --restart",
    "merge all runs from scratch",
    "merge from scratch",
    "merge into a base that stores both, with tie_word_embeddings set to false in its configuration",
    "merge the adapter into its base first (emomerge bake, or merge_and_unload())",
    "multiply alpha by √r and remove rs_lora from ss_network_args",
    "name a file for each run: `information`",
    "omit the option",
    'pass `EmoPulse("{}", size=weight_size(parameters))`',
    "pass them to your own",
    "pip install 'emomerge[ray]'",
    "pip install 'emomerge[slurm]'",
    "pip install {}",
    "put it back; the same command resumes",
    "put the base's config.json beside its weights",
    "restore it, or merge from scratch",
    "run the command again",
    "run the recipe to its end first",
    "run the same command again",
    "save it with PEFT's path_initial_model_for_weight_conversion, which converts it into plain LoRA",
    "set `weight_decay` in the TrainingArguments",
    "set task.image_size",
    "set trim: tensor, or one density for all tensors",
    "take Hessian products by finite differences",
    "train it again",
    "train with ensure_weight_tying=True or untie the base first",
    "train with sparse=False",
    "use Trainer for others",
    "use a constant schedule; to rescale on purpose, set group['scope'] to the same value",
    "use auto or cpu",
    "use geometry='exact'",
    "use greedy-soup",
    'use lr_scheduler_type="constant" and warmup_steps=0',
    "use one of them",
    "use only one of the two",
    "use runs.parallel: auto",
    "use runs.parallel: auto, or no executor",
    "use the checkpoint's own base",
    "use torch.view_as_real",
    "wait for it, or choose another -o",
}
"""Advice that no scenario follows yet."""
