"""The call of call_plain.py with mupace."""

from __future__ import annotations

import torch
from mup_models.plain import GPT

import mupace


def made(width: int, hidden: int, lr: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = GPT(width, hidden)
    ids = torch.zeros(1, 8, dtype=torch.long)
    plan = mupace.parametrize(model, base=GPT(32, 64), rules="mup_multiplier", explicit=("logits",), inputs=(ids,))
    optimizer = torch.optim.AdamW(plan.groups(lr=lr, weight_decay=0.1, no_decay=()))
    return model, optimizer
