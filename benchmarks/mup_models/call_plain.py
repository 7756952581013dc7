"""How the author of plain.py makes a model and its optimizer."""

from __future__ import annotations

import torch
from mup_models.plain import GPT


def made(width: int, hidden: int, lr: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = GPT(width, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    return model, optimizer
