"""What an update computes: forward, backward, clipping, and losses without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from mupace.clipping import AdaptiveClip
from mupace.gradients import Norms, centralise
from mupace.trainer.model import evaluating
from mupace.trainer.parts import Parts
from mupace.weighting import normalised, weighted_causal_loss


class Compute:
    """The model of a run at work."""

    def __init__(self, parts: Parts, scaler: torch.amp.GradScaler) -> None:
        self.parts, self.scaler, self.config, self.model = parts, scaler, parts.config, parts.model
        self.forward = torch.compile(self.model) if self.config.model.compile else self.model
        self.eval_blocks = parts.data.eval_blocks(self.config.eval.blocks)
        self.adaptive = _adaptive(parts)

    def accumulate(self, blocks: Any) -> torch.Tensor:
        """Forward and backward over the micro-batches; returns the mean loss, weighted as it was, on its device."""
        c = self.config.batch
        ids = self.parts.data.train.take(blocks).to(self.parts.device, non_blocking=True)  # [B, T+1]
        total = torch.zeros((), device=self.parts.device)
        for micro, weights in zip(torch.split(ids, c.micro), self._weights(blocks), strict=True):
            with self.autocast():
                loss: Any = self._loss(micro, weights) / c.accumulate
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _weights(self, blocks: Any) -> Sequence[torch.Tensor | None]:
        """Those of each micro-batch's samples, with mean 1 over the update; None where the loss is the plain one."""
        c, known = self.config.batch, self.parts.data.weights
        if known is None or not known.in_loss:
            return [None] * c.accumulate
        made = normalised(torch.split(known.of(blocks), c.micro))
        return [None] * c.accumulate if all(bool((w == 1).all()) for w in made) else made

    def _loss(self, micro: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The model's own loss; with weights, the weighted mean over tokens and what its routers add to it."""
        if weights is None:
            loss: torch.Tensor = self.forward(input_ids=micro, labels=micro, use_cache=False).loss
            return loss
        out = self.forward(input_ids=micro, use_cache=False)
        loss = weighted_causal_loss(out.logits, micro, weights, per="token")
        routers = getattr(out, "aux_loss", None)
        return loss if routers is None else loss + self.model.config.router_aux_loss_coef * routers

    @torch.no_grad()
    def loss(self, blocks: Any) -> float:
        """The loss of a batch with the parameters as they are now, in the precision of training, no sample weighted."""
        ids = self.parts.data.train.take(blocks).to(self.parts.device)
        micros = torch.split(ids, self.config.batch.micro)
        with self.autocast():
            losses = [self.forward(input_ids=m, labels=m, use_cache=False).loss for m in micros]
        return float(torch.stack(losses).double().mean())

    def autocast(self) -> Any:
        """The precision of the run."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        precision = self.config.run.precision
        return nullcontext() if precision == "fp32" else torch.autocast(self.parts.device.type, dtypes[precision])

    def clip(self, look: Callable[[], None]) -> tuple[dict[str, float], bool]:
        """Unscale, look, centralise, clip by value and by norm; the norms before, and whether anything was clipped."""
        for optimizer in self.parts.optimizers:
            self.scaler.unscale_(optimizer)
        look()
        c, pacer = self.config.clip, self.parts.pacer
        if c.centralise is not None:
            centralise(self.parts.table, c.centralise)
        norms, largest = pacer.grad_norms() if c.norm is None or c.value is not None else None, 0.0
        if c.value is not None:
            largest = float(get_total_norm(self._gradients(), math.inf))
            pacer.clip_grad_value_(c.value)
        if self.adaptive is not None:
            found = self.adaptive()
            norms = norms or Norms(found.used, found.plain)
            return named(norms), largest > (c.value or math.inf) or float(found.factors.min()) < 1.0
        used = 0.0 if c.norm is None else float(pacer.clip_grad_norm_(c.norm))
        clipped = largest > (c.value or math.inf) or used > (c.norm or math.inf)
        return named(norms or pacer.last_grad_norms), clipped

    def _gradients(self) -> list[torch.Tensor]:
        return [
            p.grad for o in self.parts.optimizers for g in o.param_groups for p in g["params"] if p.grad is not None
        ]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, int]:
        """Mean loss over the fixed validation blocks, in nats per token and bits per byte, and their tokens."""
        total, tokens = 0.0, 0
        with evaluating(self.model):
            for ids in torch.split(self.eval_blocks, self.config.batch.micro):
                ids = ids.to(self.parts.device)
                with self.autocast():
                    loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
                n = ids.shape[0] * (ids.shape[1] - 1)
                total, tokens = total + float(loss) * n, tokens + n
        mean = total / tokens
        return mean, mean / math.log(2) / self.parts.data.valid_bytes_per_token, tokens


def _adaptive(parts: Parts) -> AdaptiveClip | None:
    c = parts.config.clip
    if c.adaptive is None:
        return None
    ceiling = math.inf if c.norm is None else c.norm
    given: dict[str, Any] = {} if c.quantile is None else {"quantile": c.quantile}
    return AdaptiveClip(parts.optimizers, parts.table, scope=c.adaptive, max_norm=ceiling, **given)


def named(norms: Norms | None) -> dict[str, float]:
    """The norms as a row of the record names them; the one that is used for clipping only where it is another."""
    assert norms is not None  # one of the two has been taken
    row = {"grad_norm": float(norms.plain)}
    return row if norms.used is norms.plain else {**row, "grad_norm_equivariant": float(norms.used)}
