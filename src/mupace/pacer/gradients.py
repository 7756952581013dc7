"""The gradients of the paced groups: norms and clipping, with the weights that the groups carry."""

from __future__ import annotations

from abc import abstractmethod

import torch

from mupace.gradients import Norms, Weighted, clip_norm, clip_value, norms
from mupace.pacer.lanes import Group


class Gradients:
    """The part of a pacer that looks at gradients."""

    last_grad_norms: Norms | None = None
    """Of the last `clip_grad_norm_`."""

    @abstractmethod
    def _groups(self) -> list[Group]:
        """The param groups."""

    def _weighted(self) -> Weighted:
        """The parameters with gradients, group by group, and what their squared norms count."""
        rows = ((float(g.get("clip", 1.0)), g["params"]) for g in self._groups())
        return [(rho, [p for p in params if p.grad is not None]) for rho, params in rows]

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients by min(1, c/‖g‖_ρ), over all groups; returns ‖g‖_ρ before, on its device.

            ‖g‖_ρ² = Σ_groups ρ · ‖g_group‖²

        ρ is a group's `clip` (1 where it has none): with the groups of a plan a wide model clips when its base does.
        Call it after `scaler.unscale_(optimizer)` when a GradScaler is used.

        Raises:
            ConfigError: a bound that is not positive; a norm_type other than 2 where a ρ is not 1.
        """
        self.last_grad_norms = found = clip_norm(self._weighted(), max_norm, norm_type)
        return found.used

    def clip_grad_value_(self, value: float) -> None:
        """Clamp every gradient element to [−value, value]."""
        clip_value([p for _, members in self._weighted() for p in members], value)

    def grad_norms(self) -> Norms:
        """(used, plain): ‖g‖_ρ by which `clip_grad_norm_` would clip now, and ‖g‖; on their device."""
        return norms(self._weighted())

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """‖g‖_ρ before the last `clip_grad_norm_`; `last_grad_norms` has ‖g‖ too."""
        return None if self.last_grad_norms is None else self.last_grad_norms.used
