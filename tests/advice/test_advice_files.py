"""Following the advice of messages about files that are read, written or named on the command line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from advising import Scenario, Scenarios, W, adapter, model, refused, works
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import MemoryCheckpoint, atomic, open_checkpoint, write_checkpoint, writer
from emomerge.errors import BadInput

SCENARIOS = Scenarios()
follows = SCENARIOS.follows


@follows(
    "convert it where you trust it: safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in "
    "torch.load(file, weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})"
)
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


@follows("check the path", "did you mean {}?")
def _no_path(tmp: Path) -> None:
    assert refused("inspect", tmp / "folder/none").endswith("check the path")
    works("inspect", model(tmp / "folder/none"))
    message = refused("inspect", tmp / "folder/nome")
    works("inspect", message.rpartition("did you mean ")[2].rstrip("?"))


@follows("check the spelling, the connection (HF_HUB_OFFLINE) and, for a gated model, that you are logged in")
def _hub(tmp: Path) -> None:
    """Without a connection, a model is found once it is in the cache; `snapshot_download` stands for the Hub."""
    import huggingface_hub

    base = model(tmp / "cache")
    assert "check the spelling, the connection" in refused("inspect", "somebody/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(base))
        works("inspect", "somebody/model")


@follows("download it again", "download or write it again")
def _damaged(tmp: Path) -> None:
    torch.manual_seed(0)
    original = {f"layers.{n}.weight": torch.randn(3, 5) for n in range(4)}
    write_checkpoint(MemoryCheckpoint(original), tmp / "model", max_shard_size="100")
    shard = sorted((tmp / "model").glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    assert refused("inspect", tmp / "model").endswith("download or write it again")
    shard.unlink()
    assert refused("inspect", tmp / "model").endswith("download it again")
    shard.write_bytes(data)
    works("inspect", tmp / "model")


@follows("run the command again")
def _changed(tmp: Path) -> None:
    base = model(tmp / "base")
    opened = open_checkpoint(base)
    model(tmp / "base", a=W * 2)
    with pytest.raises(BadInput, match="run the command again"):
        opened["a.weight"]
    works("inspect", base)


@follows("choose another path or give --force")
def _exists(tmp: Path) -> None:
    base, out = model(tmp / "base"), model(tmp / "out")
    arguments = ("merge", base, base, "--method", "mean", "-o")
    assert refused(*arguments, out).endswith("choose another path or give --force")
    works(*arguments, tmp / "another")
    works(*arguments, out, "--force")


@follows("choose another path")
def _another(tmp: Path) -> None:
    base = model(tmp / "base")
    (tmp / "file").write_text("")
    arguments = ("merge", base, base, "--method", "mean", "--force", "-o")
    for place in (tmp / "file/out", Path("/proc/out"), base, Path.cwd()):
        assert refused(*arguments, place).endswith("choose another path")
    works(*arguments, tmp / "out")


@follows("choose a shorter one")
def _long(tmp: Path) -> None:
    base = model(tmp / "base")
    arguments = ("merge", base, base, "--method", "mean", "-o")
    assert refused(*arguments, tmp / ("x" * 300)).endswith("choose a shorter one")
    works(*arguments, tmp / "x")


@follows("free some space or choose another path", "choose a smaller --max-shard-size")
def _full(tmp: Path) -> None:
    """The disk has room for small files only, or its file system for files of less than 200 bytes."""
    base = model(tmp / "base", a=W, b=W, c=W, d=W)
    arguments = ("merge", base, base, "--method", "mean", "-o", tmp / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "free_space", lambda path: 10)
        assert refused(*arguments).endswith("free some space or choose another path")
    written = writer.write_file

    def limited(checkpoint: MemoryCheckpoint, plan: dict[str, object], *rest: object) -> str:
        if len(plan) > 2:
            raise OSError(errno.EFBIG, "File too large")
        return written(checkpoint, plan, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_file", limited)
        assert refused(*arguments).endswith("choose a smaller --max-shard-size")
        works(*arguments, "--max-shard-size", "40")
    works(*arguments, "--force")


@follows("give a name without .safetensors")
def _parts(tmp: Path) -> None:
    for part in ("unet", "vae"):
        (tmp / "base" / part).mkdir(parents=True)
        save_file({"a.weight": W.clone()}, tmp / "base" / part / "diffusion_pytorch_model.safetensors")
    (tmp / "base/model_index.json").write_text(json.dumps({"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}))
    arguments = ("merge", tmp / "base", tmp / "base", "--method", "mean", "-o")
    assert refused(*arguments, tmp / "out.safetensors").endswith("give a name without .safetensors")
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


class _Hub:
    """Stands for the Hub: takes an upload, or fails with `error`."""

    error: Exception | None = None

    def create_repo(self, repo: str, **_: object) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=repo)

    def create_commit(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(oid="a" * 40)


@follows(
    "unset it, or look first with --dry-run", "log in with `hf auth login`, or set HF_TOKEN", "check the connection",
    "log in with a token that may write there: `hf auth login`",
)  # fmt: skip
def _push(tmp: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    push = ("push", model(tmp / "merged"), "me/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", _Hub)
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert refused(*push).endswith("unset it, or look first with --dry-run")
        works(*push, "--dry-run")
        patch.delenv("HF_HUB_OFFLINE")
        assert refused(*push).endswith("log in with `hf auth login`, or set HF_TOKEN")
        patch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
        patch.setattr(_Hub, "error", ConnectionError("no route"))
        assert refused(*push).endswith("check the connection")
        response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
        patch.setattr(_Hub, "error", HfHubHTTPError("no", response=response))
        assert refused(*push).endswith("log in with a token that may write there: `hf auth login`")
        patch.setattr(_Hub, "error", None)
        works(*push)


@pytest.mark.parametrize("scenario", SCENARIOS.each())
def test_following_the_advice_succeeds(scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    scenario(tmp_path)
