"""The call of call_plain.py with microsoft's mup."""

from __future__ import annotations

import mup
import torch
from mup_models.with_mup import GPT, initialise


def made(width: int, hidden: int, lr: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = GPT(width, hidden)
    mup.set_base_shapes(model, GPT(32, 64), delta=GPT(64, 128))
    model.apply(initialise)
    optimizer = mup.MuAdamW(model.parameters(), lr=lr, weight_decay=0.1)
    return model, optimizer
