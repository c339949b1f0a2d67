"""Following the advice of messages about optimizers, trainers and measured models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from advising import Scenario, Scenarios, W
from torch import Tensor, nn

import emomerge
from emomerge.checkpoints import MemoryCheckpoint, load_into, model_checkpoint
from emomerge.errors import BadInput
from emomerge.optim import OPTIMIZERS, EmoPulse, EmoPulseLR, EmoSens, EmoTion, weight_size
from emomerge.optim.device_pulse import DevicePulse
from emomerge.probing import Perturbable, rms

SCENARIOS = Scenarios()
follows = SCENARIOS.follows


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(W.to(dtype))]


def step(optimizer: Any, loss: float = 0.5, gradient: Tensor | None = None) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if gradient is None else gradient
    optimizer.observe(loss)
    optimizer.step()


@follows("average it first, as in `loss.mean()`")
def _vector_loss(tmp: Path) -> None:
    optimizer = EmoSens(weights())
    with pytest.raises(BadInput, match="average it first"):
        optimizer.observe(W)
    optimizer.observe(W.mean())


@follows("give `divided` the same value for every micro-batch")
def _divided(tmp: Path) -> None:
    optimizer = EmoSens(weights())
    optimizer.observe(1.0, divided=True)
    with pytest.raises(BadInput, match="the same value for every micro-batch"):
        optimizer.observe(1.0)
    optimizer.observe(1.0, divided=True)


@follows("use its own `pulse`")
def _own_pulse(tmp: Path) -> None:
    optimizer = EmoSens(weights())
    with pytest.raises(BadInput, match="use its own `pulse`"):
        EmoPulseLR(optimizer)
    step(optimizer)
    assert optimizer.pulse.rate > 0


@follows("use only one of the two", "use geometry='exact'", "omit the option")
def _capturable(tmp: Path) -> None:
    with pytest.raises(BadInput, match="use only one of the two"):
        EmoSens(weights(), capturable=True, use_shadow=True)
    with pytest.raises(BadInput, match="use geometry='exact'"):
        EmoTion(weights(), capturable=True, geometry="l1")
    with pytest.raises(BadInput, match="omit the option"):
        DevicePulse(EmoPulse(), torch.device("mps"))
    for made in (
        EmoSens(weights(), capturable=True), EmoSens(weights(), use_shadow=True),
        EmoTion(weights(), capturable=True, geometry="exact"), EmoTion(weights(), geometry="l1"),
    ):  # fmt: skip
        step(made)


@follows("use a constant schedule; to rescale on purpose, set group['scope'] to the same value")
def _schedule(tmp: Path) -> None:
    optimizer = EmoSens(weights())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(optimizer)
    schedule.step()
    with pytest.raises(BadInput, match="use a constant schedule"):
        step(optimizer)
    group = optimizer.param_groups[0]
    group["scope"] = group["lr"]
    step(optimizer)
    constant = EmoSens(weights())
    schedule = torch.optim.lr_scheduler.ConstantLR(constant, factor=1.0)
    for _ in range(2):
        step(constant)
        schedule.step()


@follows("train with sparse=False", "use torch.view_as_real")
def _gradients(tmp: Path) -> None:
    for sparse in (True, False):
        embedding = nn.Embedding(3, 2, sparse=sparse)
        optimizer = EmoSens(embedding.parameters())
        loss = embedding(torch.tensor([1])).square().sum()
        loss.backward()
        optimizer.observe(loss)
        if sparse:
            with pytest.raises(BadInput, match="train with sparse=False"):
                optimizer.step()
        else:
            optimizer.step()
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(BadInput, match="use torch.view_as_real"):
        step(EmoSens([number]))
    step(EmoSens([nn.Parameter(torch.view_as_real(number.detach()).clone())]))


@follows("load the state that {} saved for this model")
def _state(tmp: Path) -> None:
    own, other = EmoSens(weights()), OPTIMIZERS["tion"].load()(weights())
    for each in (own, other):
        step(each)
    new = EmoSens(weights())
    with pytest.raises(BadInput, match="load the state that EmoSens saved for this model"):
        new.load_state_dict(other.state_dict())
    new.load_state_dict(own.state_dict())
    step(new)


@follows("after replacing `.data` of a parameter, create the optimizer again")
def _replaced(tmp: Path) -> None:
    for name in ("sens", "cats"):  # torch's operations; a kernel, if they were compiled
        parameters = weights()
        optimizer = OPTIMIZERS[name].load()(parameters)
        step(optimizer)
        parameters[0].data = torch.ones(3, 5)
        with pytest.raises(BadInput, match="create the optimizer again"):
            step(optimizer)
        step(OPTIMIZERS[name].load()(parameters))


@follows('pass `EmoPulse("{}", size=weight_size(parameters))`')
def _size(tmp: Path) -> None:
    with pytest.raises(BadInput, match=r"size=weight_size\(parameters\)"):
        EmoPulse("auto").update(0.5)
    assert EmoPulse("auto", size=weight_size(weights())).update(0.5) > 0


def trainer(tmp: Path, cls: Any, arguments: dict[str, Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    rows = [{"input_ids": torch.arange(4) + n, "labels": torch.arange(4) + n} for n in range(2)]
    given = transformers.TrainingArguments(
        str(tmp / "out"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **arguments
    )
    options = {key: value(model) if isinstance(value, Callable) else value for key, value in options.items()}  # type: ignore[arg-type]
    return cls(model=model, args=given, train_dataset=rows, **options)


@follows(
    "use Trainer for others", "pass them to your own", "set `weight_decay` in the TrainingArguments",
    'use lr_scheduler_type="constant" and warmup_steps=0',
)  # fmt: skip
def _trainer(tmp: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from emomerge.integrations import EmoTrainer

    constant: dict[str, Any] = {"lr_scheduler_type": "constant"}

    def plain(model: Any) -> Any:
        return torch.optim.AdamW(model.parameters()), None

    def own(model: Any) -> Any:
        return EmoSens(model.parameters()), None

    for message, arguments, options in (
        ("use Trainer for others", constant, {"optimizers": plain}),
        ("pass them to your own", constant, {"optimizers": own, "emo_options": {"lr": 3.0}}),
        ("set `weight_decay` in the TrainingArguments", constant, {"emo_options": {"weight_decay": 0.1}}),
        ('use lr_scheduler_type="constant"', {"lr_scheduler_type": "cosine", "warmup_steps": 3}, {}),
    ):
        with pytest.raises(BadInput, match=message):
            trainer(tmp, EmoTrainer, arguments, **options)
    trainer(tmp, transformers.Trainer, constant, optimizers=plain).train()
    lr = 3.0
    trainer(tmp, EmoTrainer, constant, optimizers=lambda model: (EmoSens(model.parameters(), lr=lr), None)).train()
    trainer(tmp, EmoTrainer, {**constant, "weight_decay": 0.1, "warmup_steps": 0}).train()


def square(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return model(batch).square().mean(), float(len(batch))


def probe(model: nn.Module, metrics: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    return emomerge.probe(model, square, [torch.randn(4, 3, dtype=dtype)], metrics, **options)


@follows("load the model in float32", "load the model in float32, or take larger radii")
def _half(tmp: Path) -> None:
    torch.manual_seed(0)
    for metric, options in {"hessian": {}, "worst-case": {}}.items():
        with pytest.raises(BadInput, match="load the model in float32$"):
            probe(nn.Linear(3, 2).bfloat16(), {metric: options})
        probe(nn.Linear(3, 2), {metric: options})
    with pytest.raises(BadInput, match="load the model in float32$"):
        emomerge.probe(nn.Linear(3, 2).to(torch.float8_e4m3fn), square, [torch.ones(4, 3)], ["gaussian"], reference={})
    small, large = {"gaussian": {"radii": (1e-4,)}}, {"gaussian": {"radii": (0.1,)}}
    with pytest.raises(BadInput, match="or take larger radii"):
        probe(nn.Linear(3, 2).bfloat16(), small)
    probe(nn.Linear(3, 2), small)
    probe(nn.Linear(3, 2).bfloat16(), large)


@follows("load the model without offloading")
def _offloaded(tmp: Path) -> None:
    with pytest.raises(BadInput, match="without offloading"):
        rms(nn.Linear(3, 2).to("meta"))
    assert rms(nn.Linear(3, 2))["weight"] > 0


@follows("merge the adapter into its base first (emomerge bake, or merge_and_unload())")
def _factors(tmp: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(BadInput, match=r"merge_and_unload\(\)"):
        probe(adapted, ["gaussian"])
    merged = adapted.merge_and_unload()
    merged.requires_grad_(True)
    probe(merged, ["gaussian"])


@follows("take Hessian products by finite differences")
def _products(tmp: Path) -> None:
    model, target = nn.Linear(2, 1, bias=False), torch.tensor([[0, -1]])
    from emomerge.probing import hessian

    def margin(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        loss: Tensor = nn.functional.multilabel_margin_loss(model.weight, target)  # type: ignore[arg-type]
        return loss, 1.0

    probed = Perturbable(model, margin, [None], rms(model))
    with pytest.raises(BadInput, match="take Hessian products by finite differences"):
        hessian.lanczos(probed, 2, hvp="autograd")
    hessian.lanczos(probed, 2, hvp="finite-difference")


@follows("give {}", "leave the ledger out")
def _arguments(tmp: Path) -> None:
    base, model = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(BadInput, match="give reference=, the base as a module"):
        probe(model, ["distance"])
    probe(model, ["distance"], reference=base)

    class Rows(list):  # type: ignore[type-arg]
        pass

    rows = [{"x": torch.ones(4, 3), "names": {1, 2}}]

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        return square(model, batch["x"])

    with pytest.raises(BadInput, match="leave the ledger out"):
        emomerge.probe(model, loss, rows, ["gaussian"], ledger=tmp / "ledger.jsonl")
    emomerge.probe(model, loss, rows, ["gaussian"])


@follows("use the checkpoint's own base")
def _of_another_model(tmp: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(BadInput, match="use the checkpoint's own base"):
        load_into(model, MemoryCheckpoint({"1.weight": torch.ones(2, 3)}))
    load_into(model, model_checkpoint(nn.Sequential(nn.Linear(3, 2)), source="own"))


@pytest.mark.parametrize("scenario", SCENARIOS.each())
def test_following_the_advice_succeeds(scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenario(tmp_path)
