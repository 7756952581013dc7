"""The length that the check works with: what was given to it, and what the pacer knows besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mupace
from mupace import Pacer
from mupace.checks.subject import from_loop


@pytest.mark.parametrize(
    ("known", "given", "steps", "tokens"),
    [
        ({"tokens_per_step": 64, "steps_per_epoch": 50}, {"total": "2 epochs", "samples_per_step": 4}, 100, 64),
        ({"tokens_per_step": 64}, {"total": "6400 tokens", "samples_per_step": 4}, 100, 64),
        ({"samples_per_step": 8, "tokens_per_sample": 8}, {"total": "6400 tokens", "tokens_per_sample": 16}, 50, 128),
        ({"samples_per_step": 8, "samples_per_epoch": 400}, {"total": "1 epochs", "samples_per_step": 4}, 100, None),
        ({"seconds_per_step": 0.5}, {"total": "50 s", "samples_per_step": 4}, 100, None),
    ],
    ids=str,
)
def test_a_total_of_ones_own_keeps_the_rates_that_the_pacer_knows(
    known: dict[str, Any], given: dict[str, Any], steps: int, tokens: int | None
) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    pacer = Pacer(optimizer, mupace.schedule("hold", total="100 steps", **known))
    h = from_loop(
        **dict.fromkeys(("updates", "calls_per_update", "stage", "model", "peak", "floor", "tokens_per_sample"))
        | {"optimizer": optimizer, "scheduler": pacer, "accumulate": 1, "samples_per_step": None}
        | given
    ).horizon
    assert h is not None
    assert (h.steps, h.tokens_per_step) == (steps, tokens)
