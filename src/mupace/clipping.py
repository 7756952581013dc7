"""Clipping by thresholds that a run's own gradients set.

Order of an update: backward, unscale, `centralise`, `AdaptiveClip`, optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mupace.errors import ConfigError, StateError, one_of
from mupace.gradients import Weighted, each_norm, norms
from mupace.params import ParamTable
from mupace.units import is_number

SCOPES = ("role", "tensor", "global")
RULES = ("quantile", "ema")
TINY = 1e-6  # torch's own, in clip_grad_norm_: with no threshold at work the two agree to the bit


class Clipped(NamedTuple):
    """What one call of `AdaptiveClip` found and did; tensors, on the device of the gradients."""

    used: torch.Tensor
    """‖g‖_ρ before, over all gradients."""
    plain: torch.Tensor
    """‖g‖ before, over all gradients."""
    factors: torch.Tensor
    """What the gradients of each part were multiplied by, in the order of `AdaptiveClip.parts`."""
    rate: torch.Tensor
    """Share of the last `window` finite norms, over all parts, whose gradients were scaled down."""


class AdaptiveClip:
    """Scale each part's gradients by min(1, T/‖g‖_ρ), T from the part's own past; then all to `max_norm`.

        "quantile": T = the q-th quantile of the last `window` norms before clipping, this update's not among them
        "ema":      T = factor · m,    m ← decay · m + (1 − decay) · min(T, ‖g‖_ρ)
        then all:   min(1, max_norm / ‖clipped g‖_ρ)

    A part is a role, a tensor or the whole model (`scope`); ‖·‖_ρ weighs a tensor's ‖g‖² by its group's `clip`, as
    `Pacer.clip_grad_norm_` does, so that a widened model clips as its base. Before `warmup` norms of a part T is
    infinite there and `max_norm` alone clips; m is their plain mean meanwhile.

    A norm of 0 enters no statistic (a tensor that has no gradient at first would never get one), nor does one that is
    NaN or infinite. That one makes all gradients NaN, as torch's clipping does: leave such an update out.

    Nothing waits for a device. Every rank decides alike, because it sees the same gradients (DDP) or the norm over all
    shards (FSDP2, DTensor).

    Sources: Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks" (arXiv
    2007.14469) clip at a low quantile of all past norms; Wang et al., "AdaGC: Improving Training Stability for Large
    Language Model Pretraining" (arXiv 2502.11034) clip each tensor at a multiple of the mean of its clipped norms. They
    begin with the least norm of the warm-up; as m rises by (1 − decay)(factor − 1), 0.1 %, per update at most, one tiny
    norm would hold a tensor down for thousands of updates, so here it begins with their mean. The window, q, the roles
    and the defaults of `decay` and `factor` have no source: this library's choice. For AdaGC's form (scope="tensor",
    rule="ema") there is good evidence of stability at high rates, and of little where a run is stable anyway; for the
    others none.

    Args:
        groups: an optimizer, several, or param groups.
        table: the roles and names of the tensors. For scope="role" where the groups have no key role
            (`groups(..., split=["*"])` gives it); for names in the state.
        scope: "role", "tensor" or "global".
        max_norm: the ceiling of the norm over all, positive; math.inf for none.
        rule: "quantile" or "ema".
        quantile: q, in (0, 1).
        window: norms in the ring of each part, and of the clip rate; at least `warmup`.
        warmup: norms of a part, finite and above 0, before its own threshold counts; 1 or more.
        decay: of the mean, in (0, 1).
        factor: multiple of the mean; positive.

    Raises:
        ConfigError: a number out of range; a tensor without a role, or that the table does not have.

    >>> from mupace.params import param_table
    >>> layer = torch.nn.Linear(3, 2)
    >>> clip = AdaptiveClip(torch.optim.SGD(layer.parameters(), lr=0.1), table=param_table(layer), max_norm=0.5)
    >>> layer(torch.ones(4, 3)).sum().backward()
    >>> f"{clip().used:.2f}", clip.parts
    ('11.31', ('bias', 'linear'))
    >>> f"{sum(p.grad.square().sum() for p in layer.parameters()).sqrt():.2f}"
    '0.50'
    """

    def __init__(
        self,
        groups: Any,
        table: ParamTable | None = None,
        *,
        scope: str = "role",
        max_norm: float = 1.0,
        rule: str = "quantile",
        quantile: float = 0.98,
        window: int = 256,
        warmup: int = 64,
        decay: float = 0.98,
        factor: float = 1.05,
    ) -> None:
        for name, value, legal in (("scope", scope, SCOPES), ("rule", rule, RULES)):
            if value not in legal:
                raise one_of(name, value, legal)
        self.scope, self.rule = scope, rule
        self.max_norm = _number("max_norm", max_norm, math.inf, inclusive=True)
        self.quantile, self.decay = _number("quantile", quantile, 1), _number("decay", decay, 1)
        self.factor = _number("factor", factor, math.inf)
        self.window, self.warmup = _whole_number("window", window), _whole_number("warmup", warmup)
        if self.warmup > self.window:
            raise ConfigError(f"warmup={warmup} is more than window={window} holds: legal is 1 to {window}")
        members = _parts(_param_groups(groups), scope, table)
        self.parts = tuple(sorted(members))
        """Names of the parts."""
        self._members = [members[name] for name in self.parts]
        self._forget()

    def _forget(self) -> None:
        """Memory of what was seen: all on the device of the first tensor."""
        every = [p for part in self._members for _, tensors in part for p in tensors]
        self._device, dtype = every[0].device, torch.float32
        for p in every:
            dtype = torch.promote_types(dtype, p.dtype)
        on: dict[str, Any] = {"device": self._device, "dtype": dtype}
        n, shape = len(self.parts), (len(self.parts), self.window)
        self._ring = torch.full(shape, math.inf, **on)  # inf: not filled yet
        self._scaled = torch.zeros(shape, device=self._device, dtype=torch.bool)
        self._count = torch.zeros(n, device=self._device, dtype=torch.int64)
        self._mean = torch.zeros(n, **on)
        self._zero = torch.zeros((), **on)
        self._roots = [math.sqrt(rho) for part in self._members for rho, _ in part]
        self._weights = torch.tensor(self._roots, **on)  # of use for parts of one tensor each

    @torch.no_grad()
    def __call__(self) -> Clipped:
        """Clip the gradients as they are now: once per update, after backward and unscaling."""
        live = [[(rho, [p for p in tensors if p.grad is not None]) for rho, tensors in part] for part in self._members]
        rows = [i for i, part in enumerate(live) if any(tensors for _, tensors in part)]
        if not rows:
            return Clipped(self._zero.clone(), self._zero.clone(), torch.ones_like(self._mean), self.rate)
        used, plain = self._norms(live, rows)
        norm, there = self._spread(used, rows)
        own = (self.thresholds / (norm + TINY)).clamp(max=1.0)
        whole = _over_all(used)
        total = torch.where(own.min() == 1.0, whole, torch.linalg.vector_norm(own * norm))  # to the bit where idle
        factors = own * (self.max_norm / (total + TINY)).clamp(max=1.0)
        for i in rows:
            _multiply([p for _, tensors in live[i] for p in tensors], factors[i])
        self._observe(norm, own, factors, there)
        return Clipped(whole, whole if plain is used else _over_all(plain), factors, self.rate)

    def _norms(self, live: Sequence[Weighted], rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of the parts that have gradients, weighted and plain; the same tensor where every weight is 1."""
        plainly = all(root == 1.0 for root in self._roots)
        if self.scope == "tensor":
            grads = [p.grad for i in rows for _, tensors in live[i] for p in tensors if p.grad is not None]
            plain = each_norm(grads).to(self._device)
            if plainly:
                return plain, plain
            roots = self._weights if len(rows) == len(self.parts) else torch.stack([self._weights[i] for i in rows])
            return plain * roots, plain
        found = [norms(live[i]) for i in rows]
        plain = torch.stack([x.plain.to(self._device) for x in found])
        return (plain if plainly else torch.stack([x.used.to(self._device) for x in found])), plain

    def _spread(self, used: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norms of all parts, 0 for those without gradients; and which have them, None for all."""
        if len(rows) == len(self.parts):
            return used.to(self._ring.dtype), None
        at = dict(zip(rows, used.to(self._ring.dtype).unbind(), strict=True))
        one = self._zero + 1
        parts = range(len(self.parts))
        there = torch.stack([one if i in at else self._zero for i in parts]) > 0
        return torch.stack([at.get(i, self._zero) for i in parts]), there

    @property
    def thresholds(self) -> torch.Tensor:
        """T of every part, in the order of `parts`; infinite while warming up."""
        if self.rule == "ema":
            found = self.factor * self._mean
        else:
            ordered, last = self._ring.sort(dim=1).values, (self._held - 1).clamp(min=0)
            place = self.quantile * last.to(ordered.dtype)
            low, high = (ordered.gather(1, at.long()[:, None])[:, 0] for at in (place.floor(), place.ceil()))
            found = low + (high - low) * (place - place.floor())
        return torch.where(self._count < self.warmup, math.inf, found)

    @property
    def rates(self) -> torch.Tensor:
        """Share of the last `window` finite norms of every part whose gradients were scaled down."""
        return self._scaled.sum(dim=1) / self._held.clamp(min=1)

    @property
    def rate(self) -> torch.Tensor:
        """The same over all parts."""
        return self._scaled.sum() / self._held.sum().clamp(min=1)

    @property
    def _held(self) -> torch.Tensor:
        return self._count.clamp(max=self.window)

    def _observe(
        self, norm: torch.Tensor, own: torch.Tensor, factors: torch.Tensor, there: torch.Tensor | None
    ) -> None:
        """Take the norms in; those that are 0 or not finite, or of parts without gradients, leave all as it was."""
        known = norm.isfinite() & (norm > 0)
        known = known if there is None else known & there
        slot = (self._count % self.window)[:, None]
        for ring, value in ((self._ring, norm), (self._scaled, factors < 1)):
            ring.scatter_(1, slot, torch.where(known, value, ring.gather(1, slot)[:, 0])[:, None])
        among = (self._count + 1).to(self._mean.dtype)
        share = torch.where(self._count < self.warmup, 1 / among, 1 - self.decay)
        moved = self._mean + share * (own * norm - self._mean)
        self._mean.copy_(torch.where(known, moved, self._mean))
        self._count += known

    def state_dict(self) -> dict[str, Any]:
        """What was seen, JSON-able and exact; it waits for the device."""
        held, counts, means = self._held.tolist(), self._count.tolist(), self._mean.tolist()
        rows = zip(self.parts, held, counts, means, self._ring.tolist(), self._scaled.int().tolist(), strict=True)
        return {
            "scope": self.scope,
            "window": self.window,
            "parts": {
                name: {"count": count, "mean": mean, "norms": ring[:n], "scaled": scaled[:n]}
                for name, n, count, mean, ring, scaled in rows
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; parts are found by their names. Thresholds' own options may have changed.

        Raises:
            StateError: another scope, window or set of parts; nothing is changed then.
        """
        mine = {"scope": self.scope, "window": self.window}
        for key, value in mine.items():
            if state[key] != value:
                raise StateError(f"clip {key}: the state has {state[key]!r}, this is {value!r}; legal is the same")
        saved = state["parts"]
        other = sorted(saved.keys() ^ set(self.parts))
        if other:
            where = "the state alone" if other[0] in saved else "this model alone"
            raise StateError(f"clip parts: {other[0]!r} is in {where} ({len(other)} differ); legal are the same parts")
        self._forget()
        for i, name in enumerate(self.parts):
            row = saved[name]
            n = len(row["norms"])
            self._ring[i, :n] = self._ring.new_tensor(row["norms"])
            self._scaled[i, :n] = self._scaled.new_tensor(row["scaled"])
            self._count[i] = row["count"]
            self._mean[i] = row["mean"]


def _over_all(norm: torch.Tensor) -> torch.Tensor:
    return norm[0] if len(norm) == 1 else torch.linalg.vector_norm(norm)


def _multiply(parameters: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_device.setdefault(p.grad.device, []).append(p.grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, factor.to(device))


_Part = list[tuple[float, list[torch.Tensor]]]


def _param_groups(given: Any) -> list[Mapping[str, Any]]:
    """Of an optimizer, of several, or as they are."""
    if hasattr(given, "param_groups"):
        return list(given.param_groups)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"groups={type(given).__name__}: legal is an optimizer, several, or a list of param groups")
    return [group for one in given for group in (one.param_groups if hasattr(one, "param_groups") else [one])]


def _parts(groups: Sequence[Mapping[str, Any]], scope: str, table: ParamTable | None) -> dict[str, _Part]:
    """Name of a part to its tensors, by their weights."""
    rows = {} if table is None else {id(table.tensors[row.name]): row for row in table if row.name in table.tensors}
    found: dict[str, dict[float, list[torch.Tensor]]] = {}
    for i, group in enumerate(groups):
        rho = _number(f"clip of group {group.get('name', i)!r}", group.get("clip", 1.0), math.inf)
        for j, (name, tensor) in enumerate(_named(group)):
            row = rows.get(id(tensor))
            if table is not None and row is None:
                raise ConfigError(f"table has no tensor {name or j} of group {group.get('name', i)!r}: build it again")
            label = row.name if row is not None else name or f"{group.get('name', i)}.{j}"
            part = {"global": "all", "tensor": label, "role": row.role if row is not None else group.get("role")}[scope]
            if part is None:
                raise ConfigError(
                    f"scope='role': {label} has no role; legal is table=mupace.param_table(model), or groups made with "
                    "split=['*']"
                )
            if scope == "tensor" and part in found:
                raise ConfigError(f"groups have two tensors called {part}: legal is table=mupace.param_table(model)")
            found.setdefault(part, {}).setdefault(rho, []).append(tensor)
    if not found:
        raise ConfigError("groups hold no tensor: legal is an optimizer, several, or a list of param groups")
    return {name: list(by_weight.items()) for name, by_weight in found.items()}


def _named(group: Mapping[str, Any]) -> list[tuple[str | None, torch.Tensor]]:
    """Tensors with their names where the group has them, whether an optimizer took it over or not."""
    params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    names = group.get("param_names") or [None] * len(params)
    return [p if isinstance(p, tuple) else (name, p) for name, p in zip(names, params, strict=True)]


def _number(name: str, value: Any, high: float, *, inclusive: bool = False) -> float:
    if not is_number(value) or not (0 < value < high or (inclusive and value == high)):
        legal = "a positive number" if high == math.inf else f"a number above 0 and below {high:g}"
        raise ConfigError(f"{name}={value!r}: legal is {legal}")
    return float(value)


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: legal is a whole number, 1 or more")
    return value
