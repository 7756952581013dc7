"""The Pacer in Hugging Face Trainer, Accelerate and Lightning, as their users have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mupace
from mupace import Pacer

torch.set_num_threads(1)

CURVE = mupace.schedule("warmup 2 steps | hold | sqrt 4 steps -> 0", total="10 steps")
X = torch.linspace(-1, 1, 160).reshape(80, 2)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.b(torch.tanh(self.a(x))) - x.sum(-1, keepdim=True)).square().mean()}


def paced(curve: mupace.Curve = CURVE) -> tuple[Model, torch.optim.Optimizer, Pacer]:
    model = Model()
    groups = [
        {"params": list(model.a.parameters()), "lr": 0.01, "name": "a"},
        {"params": list(model.b.parameters()), "lr": 0.03, "name": "b", "floor": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    return model, optimizer, Pacer(optimizer, curve)


def expected() -> tuple[list[float], list[float]]:
    f, g = CURVE.updates(), CURVE.floored(0.5).updates()
    return (0.01 * f).tolist(), (0.03 * g).tolist()


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Hugging Face Trainer -------------------------------------------------------------------------------------------


def hf_trainer(directory: Path, *, nan_at: int | None = None, curve: mupace.Curve = CURVE) -> tuple[Any, Model, Pacer]:
    from transformers import Trainer, TrainingArguments

    model, optimizer, pacer = paced(curve)
    rows = [{"x": row, "labels": torch.zeros(1)} for row in X]
    if nan_at is not None:
        rows[nan_at]["x"] = torch.full((2,), float("nan"))
    args = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=10,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="steps",
    )  # fmt: skip
    assert args.optim == "adamw_torch_fused"  # the default, and what `paced` builds
    return Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, pacer)), model, pacer


def logged(trainer: Any, key: str = "learning_rate") -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def test_hf_trainer_follows_the_curve_and_logs_every_group(tmp_path: Path) -> None:
    from mupace.integrations.hf import log_rates

    trainer, _, pacer = hf_trainer(tmp_path)
    log_rates(trainer, pacer)
    trainer.train()
    a, b = expected()
    assert logged(trainer) == logged(trainer, "learning_rate/a") == a
    assert logged(trainer, "learning_rate/b") == b
    assert pacer.last_epoch == trainer.state.global_step == 10
    assert not [row for row in trainer.state.log_history if "train_runtime" in row and "learning_rate/a" in row]


def test_hf_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    trainer, model, _ = hf_trainer(tmp_path / "whole")
    trainer.train()
    again, twin, pacer = hf_trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(again) == logged(trainer)  # the history of updates 1 to 4 comes from the checkpoint
    assert pacer.last_epoch == 10
    assert torch.equal(weights(twin), weights(model))


def test_hf_trainer_without_the_pacer_state_does_not(tmp_path: Path) -> None:
    trainer, model, _ = hf_trainer(tmp_path / "whole")
    trainer.train()
    scheduler = tmp_path / "whole" / "checkpoint-4" / "scheduler.pt"
    assert set(torch.load(scheduler, weights_only=True)) == {"format", "last_epoch", "journaled", "pacer"}
    torch.save(paced()[2].state_dict(), scheduler)
    again, twin, _ = hf_trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(again) != logged(trainer)
    assert not torch.equal(weights(twin), weights(model))


def test_hf_trainer_refuses_a_checkpoint_of_another_plan(tmp_path: Path) -> None:
    trainer, _, _ = hf_trainer(tmp_path / "whole")
    trainer.train()
    again, _, _ = hf_trainer(tmp_path / "again", curve=mupace.schedule("hold", total="10 steps"))
    with pytest.raises(mupace.StateError, match=r"schedule '.*' was saved, 'hold' is given"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_hf_trainer_with_a_nan_loss_keeps_the_clock_at_its_own_step(tmp_path: Path) -> None:
    trainer, model, pacer = hf_trainer(tmp_path, nan_at=7)
    trainer.train()
    assert torch.isnan(weights(model)).any()
    assert pacer.last_epoch == trainer.state.global_step == 10  # no scaler here: the update was applied
    assert logged(trainer) == expected()[0]


# Accelerate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_accelerate() -> Any:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated(split_batches: bool) -> tuple[Any, Any, Any, Any, Any, Pacer]:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(split_batches=split_batches)
    )
    model, optimizer, pacer = paced()
    data = DataLoader(TensorDataset(X), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, data, pacer), pacer


def accelerate_run(parts: Any, until: int) -> list[list[float]]:
    """Micro-batches of 4, two an update; returns the rates of every update."""
    accelerator, model, optimizer, data, scheduler, pacer = parts
    rates: list[list[float]] = []
    for i, (x,) in enumerate(data):
        if i < 2 * pacer.last_epoch:
            continue
        if pacer.last_epoch == until:
            break
        with accelerator.accumulate(model):
            accelerator.backward(model(x)["loss"])
            if accelerator.sync_gradients:
                rates.append([g["lr"] for g in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rates


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate(split_batches: bool, tmp_path: Path) -> None:
    from accelerate.scheduler import AcceleratedScheduler

    parts = accelerated(split_batches)
    assert isinstance(parts[4], AcceleratedScheduler)
    assert parts[4].scheduler is parts[5]
    rates = accelerate_run(parts, 6)
    parts[0].save_state(str(tmp_path))
    rates += accelerate_run(parts, 10)
    assert [list(r) for r in zip(*rates, strict=True)] == list(expected())
    again = accelerated(split_batches)
    again[0].load_state(str(tmp_path))
    assert again[5].last_epoch == 6
    assert accelerate_run(again, 10) == rates[6:]
    assert torch.equal(weights(again[1]), weights(parts[1]))


# Lightning ------------------------------------------------------------------------------------------------------


def lightning_fit(
    directory: Path, epochs: int, resume: Path | None = None, interval: str = "step"
) -> tuple[Any, Any, Any]:
    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer_, self.pacer = paced()
            self.rates: list[list[float]] = []

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch[0])["loss"]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates.append([g["lr"] for g in optimizer.param_groups])

        def configure_optimizers(self) -> Any:
            return {"optimizer": self.optimizer_, "lr_scheduler": {"scheduler": self.pacer, "interval": interval}}

    module = Module()
    monitor = LearningRateMonitor(logging_interval="step")
    trainer = L.Trainer(
        default_root_dir=directory, max_epochs=epochs, accelerator="cpu", devices=1, accumulate_grad_batches=2,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        logger=CSVLogger(directory / "logs"), callbacks=[monitor, ModelCheckpoint(directory / "saved", save_last=True)],
    )  # fmt: skip
    data = DataLoader(TensorDataset(X[:40]), batch_size=4)  # 10 micro-batches: 5 updates an epoch
    trainer.fit(module, data, ckpt_path=resume)
    return module, trainer, monitor


lightning_warns = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    r"ignore:The .*dataloader.* does not have many workers",
    r"ignore:Checkpoint directory .* exists and is not empty",
)


@lightning_warns
def test_lightning(tmp_path: Path) -> None:
    module, trainer, monitor = lightning_fit(tmp_path / "whole", 2)
    assert [list(r) for r in zip(*module.rates, strict=True)] == list(expected())
    assert module.pacer.last_epoch == trainer.global_step == 10
    assert sorted(monitor.lrs) == ["lr-AdamW/a", "lr-AdamW/b"]
    half, _, _ = lightning_fit(tmp_path / "half", 1)
    assert half.rates == module.rates[:5]
    again, _, _ = lightning_fit(tmp_path / "half", 2, resume=tmp_path / "half" / "saved" / "last.ckpt")
    assert again.rates == module.rates[5:]
    assert again.pacer.last_epoch == 10
    assert torch.equal(weights(again.model), weights(module.model))


@lightning_warns
def test_lightning_by_its_default_interval_steps_once_an_epoch(tmp_path: Path) -> None:
    module, _, _ = lightning_fit(tmp_path, 2, interval="epoch")
    assert module.pacer.last_epoch == 2  # why the documentation says interval="step"


def test_the_state_of_every_trainer_is_json() -> None:
    state = paced()[2].state_dict()
    assert json.loads(json.dumps(state)) == state
