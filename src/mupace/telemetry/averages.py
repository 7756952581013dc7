"""Averaged weights, kept beside the model for evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mupace.errors import ConfigError, StateError
from mupace.units import is_number


class Averaged:
    """An average of the weights along the run whose horizon is a share of the updates so far.

        a_k = a_{k−1} + γ_k · (θ_k − a_{k−1}),   γ_k = min(1, 1/(s · k))

    θ_k: the weights at the k-th sample, one every `every` updates; s: `share`. Sample j then weighs as j^(1/s − 1):
    s = 1 is the plain mean of all samples; with 1/2 the weights rise linearly, and the middle of the average lies at
    two thirds of the run. γ_1 = 1, so no start value has to be removed afterwards. The average of a long run looks far
    back, that of a short one a little, and nobody has to give a decay in updates.

    Source of averages with polynomially rising weights: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
    Optimization: Convergence Results and Optimal Averaging Schemes", arXiv 1212.1824, section 4; the defaults have
    none: this library's choice.

    Args:
        parameters: `model.named_parameters()` or `model.parameters()`. A tensor given twice counts once.
        every: updates between two samples. A sample copies all parameters to the host and waits for that.
        share: s, in (0, 1].

    The average is float32 (float64 for float64 parameters) on the host: one more copy of the model there. Buffers, such
    as batch norm's running figures, are not averaged.

    Raises:
        ConfigError: no parameters, one that is no float, a number out of range.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> averaged = Averaged(layer.named_parameters(), every=1, share=1.0)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = layer.weight.data.fill_(value)
    ...     averaged.update()
    >>> with averaged.swapped():
    ...     layer.weight.item()
    3.0
    >>> layer.weight.item()
    6.0
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        every: int = 10,
        share: float = 0.5,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r}: legal is a number of updates >= 1")
        if not (is_number(share) and 0 < share <= 1):
            raise ConfigError(f"share={share!r}: legal is a share of the run in (0, 1]")
        self.every, self.share = every, float(share)
        self.updates = self.samples = 0
        self._parameters = _named(parameters)
        self._means = {name: _empty(p) for name, p in self._parameters.items()}
        self._swapped = False

    @property
    def ready(self) -> bool:
        """Whether there is a sample to evaluate."""
        return self.samples > 0

    @torch.no_grad()
    def update(self) -> None:
        """One update was applied; every so many of them the weights are taken in.

        Raises:
            StateError: inside `swapped()`, where the model does not hold its own weights.
        """
        if self._swapped:
            raise StateError(
                "Averaged.update() inside swapped(): legal is after it, when the model has its own weights"
            )
        self.updates += 1
        if self.updates % self.every:
            return
        self.samples += 1
        weight = min(1.0, 1.0 / (self.share * self.samples))
        for name, p in self._parameters.items():
            mean = self._means[name]
            mean.lerp_(p.detach().to(device="cpu", dtype=mean.dtype), weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with the averaged weights; its own are back afterwards, bit for bit, also after an error.

        Raises:
            StateError: before the first sample, or inside another `swapped()`.
        """
        if not self.ready:
            raise StateError(f"Averaged.swapped() before the first sample: legal from update {self.every} on (`ready`)")
        if self._swapped:
            raise StateError("Averaged.swapped() inside another one: legal is one at a time")
        raw = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._swapped = True
        try:
            self._put(self._means)
            yield
        finally:
            self._put(raw)
            self._swapped = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors alone, for safetensors or `torch.save`; `mean.<name>` beside the two counters."""
        counters = {"updates": torch.tensor(self.updates), "samples": torch.tensor(self.samples)}
        return {**counters, **{f"mean.{name}": mean.clone() for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the state was saved.

        Raises:
            StateError: a name or shape that does not fit; nothing is changed then.
        """
        wanted = {"updates", "samples", *(f"mean.{name}" for name in self._means)}
        if set(state) != wanted:
            odd = sorted(set(state) ^ wanted)[0]
            raise StateError(f"state of Averaged: {odd!r} is only on one side; legal is a state of the same parameters")
        for name, mean in self._means.items():
            found = state[f"mean.{name}"]
            if found.shape != mean.shape or found.dtype != mean.dtype:
                raise StateError(
                    f"state of Averaged: mean.{name} is {found.dtype} {tuple(found.shape)}, legal is {mean.dtype} "
                    f"{tuple(mean.shape)}"
                )
        self.updates, self.samples = int(state["updates"]), int(state["samples"])
        for name, mean in self._means.items():
            mean.copy_(state[f"mean.{name}"])


def _named(
    parameters: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    items: Iterable[Any] = parameters
    for i, item in enumerate(items):
        name, p = (str(i), item) if isinstance(item, torch.Tensor) else item
        if not p.is_floating_point():
            raise ConfigError(f"parameters: {name!r} is {p.dtype}; legal are floating-point tensors")
        if id(p) not in seen:
            found[name] = p
            seen.add(id(p))
    if not found:
        raise ConfigError("parameters: none given; legal are model.named_parameters() or model.parameters()")
    return found


def _empty(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros(p.shape, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
