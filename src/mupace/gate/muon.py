"""Muon in the precision of its tensors: torch's own rounds the momentum to bfloat16 before it makes it orthogonal."""

from __future__ import annotations

from typing import Any

import torch

from mupace.optimizers import muon_factor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon without the rounding, state and settings by the same names.

        B ← μ·B + (1 − μ)·G,    U = (1 − μ)·G + μ·B (Nesterov),    W ← (1 − η·λ)·W − η·f(shape)·NS(U)

    NS is five Newton-Schulz steps X ← a·X + (b·XXᵀ + c·(XXᵀ)²)·X from U/‖U‖, f is `muon_factor`. Source: Jordan et
    al., "Muon: an optimizer for hidden layers in neural networks" (2024); Liu et al., arXiv 2502.16982.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        plain = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": STEPS,
                 "ns_coefficients": COEFFICIENTS, "adjust_lr_fn": "match_rms_adamw"}  # fmt: skip
        super().__init__(params, {**plain, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(grad))
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonal(update, group["eps"]), alpha=-group["lr"] * muon_factor(tuple(p.shape), group))


def orthogonal(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Five steps of Newton and Schulz towards the nearest orthogonal matrix of a 2-D tensor."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
