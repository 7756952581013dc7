"""The slow twin: a small model trained by written-out formulas in float64, and every figure from its definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mupace.telemetry import Telemetry

ROLES = {
    "emb.weight": "embedding",
    "mid.weight": "ffn",
    "mid.bias": "bias",
    "spare.weight": "spare",
    "still": "still",
}
USED = ("embedding", "ffn", "bias")


class Tied(nn.Module):
    """An embedding that is also the head, an expert that never gets a token, a frozen scale."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.still = nn.Parameter(torch.ones(6), requires_grad=False)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.mid(self.emb(ids[:, :-1]))) * self.still)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def batch(step: int, part: int = 0, rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(1000 * step + part))


class ByHand:
    """AdamW or SGD in the formulas of their papers; `truth` of the last step, every figure by its definition."""

    def __init__(self, kind: str, *, lr: float = 0.01, decay: float = 0.1, clip: float | None = None) -> None:
        self.model = Tied()
        self.kind, self.lr, self.decay, self.clip = kind, lr, decay, clip
        self.values = {n: p.detach().clone() for n, p in self.model.named_parameters() if n not in ("still",)}
        self.m: dict[str, torch.Tensor] = {}
        self.v: dict[str, torch.Tensor] = {}
        self.t = 0

    def gradients(self, batches: Sequence[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        live = {n: v.clone().requires_grad_() for n, v in self.values.items()}
        losses = [functional_call(self.model, live, (ids,)) for ids in batches]
        loss = sum(losses[1:], losses[0]) / len(losses)
        found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        return float(loss.detach()), {n: g for n, g in zip(live, found, strict=True) if g is not None}

    def step(self, batches: Sequence[torch.Tensor]) -> dict[str, float]:
        loss, grads = self.gradients(batches)
        truth = {"loss": loss, **gradient_truth(grads, self.m)}
        norm = truth["grad_norm"]
        if self.clip is not None:
            grads = {n: g * min(1.0, self.clip / (norm + 1e-6)) for n, g in grads.items()}
            truth["clip_rate"] = float(norm > self.clip)
        before = {n: v.clone() for n, v in self.values.items()}
        self.t += 1
        (self.adamw if self.kind == "adamw" else self.sgd)(grads)
        truth.update(update_truth(before, self.values, grads))
        if self.v:
            truth.update(moment_truth(self.v, self.t, self.lr))
        return truth

    def adamw(self, grads: Mapping[str, torch.Tensor]) -> None:
        for n, g in grads.items():
            self.m[n] = 0.9 * self.m.get(n, torch.zeros_like(g)) + 0.1 * g
            self.v[n] = 0.99 * self.v.get(n, torch.zeros_like(g)) + 0.01 * g * g
            m, v = self.m[n] / (1 - 0.9**self.t), self.v[n] / (1 - 0.99**self.t)
            self.values[n] = self.values[n] * (1 - self.lr * self.decay) - self.lr * m / (v.sqrt() + 1e-8)

    def sgd(self, grads: Mapping[str, torch.Tensor]) -> None:
        for n, g in grads.items():
            d = g + self.decay * self.values[n]
            self.m[n] = 0.9 * self.m[n] + d if n in self.m else d
            self.values[n] = self.values[n] - self.lr * self.m[n]


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def of_roles(names: Iterable[str]) -> dict[str, list[str]]:
    names = list(names)
    out = {"": names}
    for n in names:
        out.setdefault("." + ROLES[n], []).append(n)
    return out


def gradient_truth(grads: Mapping[str, torch.Tensor], momentum: Mapping[str, torch.Tensor]) -> dict[str, float]:
    truth = {}
    for suffix, names in of_roles(grads).items():
        g = flat(grads[n] for n in names)
        truth[f"grad_norm{suffix}"] = math.sqrt(sum(x * x for x in g.tolist()))
        truth[f"grad_mean{suffix}"] = sum(g.tolist()) / len(g)
        truth[f"grad_var{suffix}"] = float(g.var(unbiased=False))
        known = [n for n in names if n in momentum]
        if known:
            a, b = flat(grads[n] for n in known), flat(momentum[n] for n in known)
            truth[f"cos{suffix}"] = float(a @ b / (a.norm() * b.norm()))
    return truth


def update_truth(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], names: Iterable[str]
) -> dict[str, float]:
    truth = {}
    for suffix, mine in of_roles(names).items():
        old, new = flat(before[n] for n in mine), flat(after[n] for n in mine)
        truth[f"update_ratio{suffix}"] = float((new - old).norm() / old.norm())
    return truth


def moment_truth(v: Mapping[str, torch.Tensor], t: int, lr: float) -> dict[str, float]:
    truth = {}
    for suffix, names in of_roles(v).items():
        if not suffix:
            continue
        hat = flat(v[n] for n in names) / (1 - 0.99**t)
        truth[f"v_mean{suffix}"] = float(hat.mean())
        for q in (0.1, 0.5, 0.9, 0.99):
            truth[f"v_p{round(100 * q)}{suffix}"] = float(torch.quantile(hat, q))
            truth[f"rate_p{round(100 * q)}{suffix}"] = float(torch.quantile(lr / (hat.sqrt() + 1e-8), q))
    return truth


def optimizer_of(kind: str, model: nn.Module, lr: float = 0.01, decay: float = 0.1) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.named_parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    return torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9, weight_decay=decay)


class Loop:
    """The same training as one writes it in torch, with telemetry where it belongs."""

    def __init__(self, kind: str, *, clip: float | None = None, telemetry: bool = True, **options: Any) -> None:
        self.model = Tied()
        self.optimizer = optimizer_of(kind, self.model)
        self.clip = clip
        self.telemetry = None
        if telemetry:
            self.telemetry = Telemetry(self.optimizer, roles=ROLES, **{"budget": None, **options})

    def step(self, batches: Sequence[torch.Tensor], change: Callable[[], None] = lambda: None) -> float:
        total = 0.0
        for ids in batches:
            loss = self.model(ids) / len(batches)
            loss.backward()
            total = total + loss.detach()
        change()
        if self.telemetry is not None:
            self.telemetry.gradients()
        norm = None
        if self.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.telemetry is not None:
            self.telemetry.observe(loss=total, clipped=None if norm is None else norm > self.clip)
        return float(total)
