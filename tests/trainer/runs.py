"""A tiny run on a fixed text, and what the tests of the trainer ask about one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mupace.record import Run, read
from mupace.trainer import checkpoint
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import Parts, Result, prepare, train

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = (
    "the rate of every update is a factor of its peak and follows one curve until the run ends def step self loss "
    "return value None True 0 1 2 3 0.5 1e-3 if for in while not import numpy as np raise token αβγ η § ( ) [ ] = +"
)


def _text(size: int) -> str:
    """Words in a fixed pseudorandom order: the same text whatever else changes."""
    draw, known = random.Random(0), VOCABULARY.split()
    words = [draw.choice(known) + ("\n" if draw.random() < 0.1 else " ") for _ in range(size)]
    return "".join(words)


SOURCE = _text(6000)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a text of its own."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SOURCE)


def config(steps: int | str = 6, **changes: Any) -> RunConfig:
    """A tiny run; dotted keys are written with two underscores."""
    base = RunConfig.parse(
        {
            "schedule": {
                "text": "warmup 20% | hold | linear 30% -> 0",
                "total": f"{steps} steps" if isinstance(steps, int) else steps,
            },
            "model": {"config": TINY},
            "data": {"text": "text.txt", "seq_len": 32, "cache": "cache"},
            "batch": {"micro": 2},
            "optimizer": {"lr": 1e-2},
            "eval": {"every": "off", "blocks": 4, "sample_tokens": 0},
            "checkpoint": {"every": "off"},
        }
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


def run(c: RunConfig, out: str = "run", **options: Any) -> tuple[Result, Run]:
    return train(c, out, **options), read(out)


def weights(out: str) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(out, pytest.fail)
    assert path is not None
    return load_file(path / "model.safetensors")


def initial(c: RunConfig) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in prepare(c).model.named_parameters()}


class Crashed(Exception):
    """What a process that dies looks like from inside."""


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    def progress(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            raise Crashed

    return progress


def listing(out: str) -> dict[str, bytes]:
    """Every file with its content."""
    return {str(p): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


def overflow(parts: Parts, name: str, at: int) -> None:
    """Make one parameter's gradient infinite in its `at`-th backward pass, as an overflow does."""
    count = {"n": 0}

    def hook(grad: torch.Tensor) -> torch.Tensor:
        count["n"] += 1
        return torch.full_like(grad, torch.inf) if count["n"] == at else grad

    dict(parts.model.named_parameters())[name].register_hook(hook)
