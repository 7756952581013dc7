"""A controller in the Hugging Face Trainer, as its users have it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import mupace
from mupace import Pacer, StateError
from mupace.control import Controller, replay
from mupace.integrations.hf import ControlCallback
from mupace.policies import Proposal, Reading, State, register_policy

torch.set_num_threads(1)

CURVE = mupace.schedule("warmup 2 steps | hold | sqrt 4 steps -> 0", total="16 steps")


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class HalveOnce:
    """Halves the rate at the first reading from `at` on that knows a loss, and can end the run."""

    at: int = 4
    stop: int = 0

    name: ClassVar[str] = "halve_once"
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    def init(self) -> State:
        return {"done": False}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        if self.stop and reading.step >= self.stop:
            return (Proposal(policy="halve_once", kind="stop", reason="enough", judged=False),), state
        if state["done"] or reading.step < self.at or reading.get("loss") is None:
            return (), state
        return (Proposal(policy="halve_once", factor=0.5, ramp=1, reason="due", judged=False),), {"done": True}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.line(x) - x.sum(-1, keepdim=True)).square().mean()}


def trainer(directory: Path, run: str, **options: Any) -> tuple[Any, Controller, ControlCallback]:
    from transformers import Trainer, TrainingArguments

    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pacer = Pacer(optimizer, CURVE)
    control = Controller(
        pacer,
        [HalveOnce(**options)],
        mode="act",
        bounds=(0.25, 4.0),
        every=2,
        directory=directory / run,
        snapshots=True,
    )
    callback = ControlCallback(control)
    rows = [{"x": row, "labels": torch.zeros(1)} for row in torch.linspace(-1, 1, 256).reshape(128, 2)]
    args = TrainingArguments(
        output_dir=str(directory / run), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=16,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, optim="adamw_torch",
        dataloader_pin_memory=False, remove_unused_columns=False, eval_strategy="steps", eval_steps=4,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    made = Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:16], optimizers=(optimizer, pacer),
        callbacks=[callback],
    )  # fmt: skip
    return made, control, callback


def rates(made: Any) -> list[float]:
    return [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]


def test_the_trainer_follows_the_controller(tmp_path: Path) -> None:
    made, control, _ = trainer(tmp_path, "run")
    made.train()
    assert [d.step for d in control.decisions] == [4]
    plain = [0.01 * f for f in CURVE.updates()]
    found = rates(made)
    assert found[:4] == pytest.approx(plain[:4], rel=1e-9)
    assert found[-8:] == pytest.approx([0.5 * r for r in plain[-8:]], rel=1e-9)
    again = replay(tmp_path / "run")
    assert again.same, str(again)
    assert again.readings == 16 // 2 + 16 // 4  # every second update, and every evaluation


def test_it_resumes_with_the_trainer(tmp_path: Path) -> None:
    whole, control, _ = trainer(tmp_path, "whole", at=10)
    whole.train()
    broken, *_ = trainer(tmp_path, "broken", at=10, stop=0)
    broken.args.max_steps = 8  # as if it had been killed after its second checkpoint
    broken.train()
    made, again, callback = trainer(tmp_path, "broken", at=10)
    callback.load(tmp_path / "broken" / "checkpoint-8")
    made.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-8"))
    assert rates(made)[-8:] == rates(whole)[-8:]
    assert [d.step for d in again.decisions] == [d.step for d in control.decisions] == [10]
    assert replay(tmp_path / "broken").same


def test_a_stop_ends_the_training(tmp_path: Path) -> None:
    made, control, _ = trainer(tmp_path, "run", stop=6)
    made.train()
    assert made.state.global_step == 6
    assert control.decisions[-1].asks == ("stop",)


def test_a_checkpoint_without_it_is_named(tmp_path: Path) -> None:
    _, _, callback = trainer(tmp_path, "run")
    with pytest.raises(StateError, match="legal is a checkpoint that was saved with this callback"):
        callback.load(tmp_path)
