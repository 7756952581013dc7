"""The arithmetic on tensors. Everything stays on its device; nothing here waits for one.

Sums per tensor come back as one float64 vector; what they make together is worked out on the host (`decode`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from mupace.telemetry.members import Live, Members

QUANTILES = (0.1, 0.5, 0.9, 0.99)
SAMPLE = 4096
"""Coordinates of a role that its percentiles rest on: the rank of a percentile p is then known to
sqrt(p · (1 − p) / 4096), at most 0.8 %. An exact torch.quantile over all costs more than the step itself."""


class Part(NamedTuple):
    """One measurement, its sums still on their device."""

    kind: str
    numbers: tuple[int, ...]
    """Whose sums they are; for `moments` how many coordinates each role has."""
    sums: torch.Tensor
    second: tuple[int, ...] = ()
    """Those of them with a momentum."""
    roles: tuple[str, ...] = ()
    """The roles of `moments`, in order."""


def gradients(members: Iterable[Live]) -> Part | None:
    """Per tensor Σg and ‖g‖; per tensor that has a momentum m, g·m and ‖m‖.

    m is as it was before the step: after it, m contains g, and the cosine would be too large by that share. Where the
    optimizer maximizes, its momentum is of −g, and the sign of the product is turned.
    """
    live = list(members)
    if not live:
        return None
    grads = [_dense(p.tensor) for p in live]
    pairs = [(p, g, m) for p, g in zip(live, grads, strict=True) if (m := p.momentum) is not None]
    sums = [g.sum(dtype=_wide(g)) for g in grads]
    dots = [-_dot(g, m) if p.group.get("maximize") else _dot(g, m) for p, g, m in pairs]
    return Part(
        "gradients",
        tuple(p.number for p in live),
        _vector([*sums, *_norms(grads), *dots, *_norms([m for _, _, m in pairs])]),
        second=tuple(p.number for p, _, _ in pairs),
    )


def snapshot(members: Iterable[Live], space: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The tensors that are about to be updated, copied; number -> copy.

    Copies on the host are made into `space` and stay there for the next time: fresh memory costs five times the copy
    (17 ms against 2 ms for 4.9 M parameters, page faults). Those on an accelerator are the caller's to let go of.
    """
    live = list(members)
    for p in live:
        if p.tensor.device.type == "cpu" and p.number not in space:
            space[p.number] = torch.empty_like(p.tensor, requires_grad=False)
    copies = [space[p.number] if p.number in space else torch.empty_like(p.tensor) for p in live]
    for device in {copy.device for copy in copies}:
        mine = [(copy, p.tensor.detach()) for copy, p in zip(copies, live, strict=True) if copy.device == device]
        torch._foreach_copy_([copy for copy, _ in mine], [tensor for _, tensor in mine])
    return {p.number: copy for p, copy in zip(live, copies, strict=True)}


def update(before: dict[int, torch.Tensor], after: Sequence[torch.Tensor], *, keep: bool) -> Part | None:
    """Per tensor ‖θ_after − θ_before‖, weight decay included, and ‖θ_before‖; without `keep`, `before` is used up."""
    if not before:
        return None
    old, new = list(before.values()), [after[number].detach() for number in before]
    sizes = _norms(old)
    if keep:
        old = [a - b for a, b in zip(new, old, strict=True)]
    else:
        torch._foreach_sub_(old, new)
    return Part("update", tuple(before), _vector([*_norms(old), *sizes]))


def joined(updates: Sequence[Part]) -> Part:
    """The updates of several optimizers as one."""
    home = updates[0].sums.device
    rows = torch.cat([part.sums.to(home).reshape(2, -1) for part in updates], dim=1)
    return Part("update", tuple(number for part in updates for number in part.numbers), rows.reshape(-1))


def moments(members: Iterable[Live], whole: Members) -> Part | None:
    """Per role of Adam-like state: Σv̂, percentiles of v̂ and of the rate lr/(sqrt(v̂) + eps) of every coordinate.

        v̂ = v / (1 − β2^t)

    v: `exp_avg_sq`; the rate takes `max_exp_avg_sq` under amsgrad, as the step does. t: steps of that tensor. The
    sample of a role takes every s-th coordinate of each of its tensors, so each counts by its size.
    """
    by_role: dict[str, list[Live]] = {}
    for p in members:
        if p.kept("exp_avg_sq") is not None and "step" in p.state and {"betas", "eps"} <= p.group.keys():
            by_role.setdefault(whole.roles[p.number], []).append(p)
    if not by_role:
        return None
    counts = [sum(whole.sizes[p.number] for p in mine) for mine in by_role.values()]
    values: list[torch.Tensor] = []
    for mine, count in zip(by_role.values(), counts, strict=True):
        values += _moments_of(mine, max(1, count // SAMPLE))
    return Part("moments", tuple(counts), _vector(values), roles=tuple(by_role))


def _moments_of(members: Sequence[Live], stride: int) -> list[torch.Tensor]:
    totals, seconds, rates = [], [], []
    for p in members:
        v, step = p.state["exp_avg_sq"], p.state["step"]
        count = step.to(finest(step.device)) if isinstance(step, torch.Tensor) else float(step)
        debias = 1.0 - float(p.group["betas"][1]) ** count
        totals.append(v.sum(dtype=_wide(v)).to(finest(v.device)) / debias)
        seconds.append(_sample(v, stride) / debias)
        used = p.state.get("max_exp_avg_sq")
        denominator = (seconds[-1] if used is None else _sample(used, stride) / debias).sqrt() + p.group["eps"]
        rates.append(p.group["lr"] / denominator)
    home = seconds[0].device
    whole = torch.stack([total.to(home) for total in totals]).sum()
    return [whole, *_quantiles(seconds, home), *_quantiles(rates, home)]


def _quantiles(samples: Sequence[torch.Tensor], home: torch.device) -> tuple[torch.Tensor, ...]:
    """The percentiles by linear interpolation of the sorted sample; any NaN in it makes them all NaN."""
    ordered = torch.cat([sample.to(home) for sample in samples]).sort().values  # NaN sorts to the end
    found = []
    for q in QUANTILES:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        between = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
        found.append(between + ordered[-1] * 0)
    return tuple(found)


def _sample(values: torch.Tensor, stride: int) -> torch.Tensor:
    """Every stride-th element in float64, evenly over the first dimension and over all that one index of it holds.

    The stride shares no factor with the size of that, so it visits all of it: the columns of a matrix, and every input
    channel of a kernel, whose rows are short.
    """
    inner = max(1, math.prod(values.shape[1:]))
    while stride > 1 and math.gcd(stride, inner) != 1:
        stride += 1
    return values.detach().reshape(-1)[::stride].to(finest(values.device))


def finest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    grad = tensor.grad.detach()
    return grad.to_dense() if grad.is_sparse else grad


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """2-norms, accumulated in float32 at least."""
    out: list[torch.Tensor | None] = [None] * len(tensors)
    for dtype in {_wide(t) for t in tensors}:
        mine = [i for i, t in enumerate(tensors) if _wide(t) == dtype]
        for i, norm in zip(mine, torch._foreach_norm([tensors[i] for i in mine], 2, dtype), strict=True):
            out[i] = norm
    return [norm for norm in out if norm is not None]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(_wide(a), _wide(b))
    product: torch.Tensor = torch.dot(a.reshape(-1).to(dtype), b.detach().to(a.device, dtype).reshape(-1))
    return product


def _vector(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One float64 vector on the device of the first."""
    home = values[0].device
    return torch.stack([value.detach().to(device=home, dtype=finest(home)) for value in values])
