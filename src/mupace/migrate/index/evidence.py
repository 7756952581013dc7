"""What the numbers of a few rows say about an optimizer's state: that moments are moments, and whose they are.

Moments. Adam keeps m = Σ a_k g_k and v = Σ b_k g_k² with a_k = (1-β1) β1^k, b_k = (1-β2) β2^k over past gradients g_k,
so v >= 0, and by the Cauchy-Schwarz inequality

    m² <= c · v,    c = Σ a_k²/b_k = (1-β1)² / ((1-β2) (1 - β1²/β2)),    if β1² < β2.

Order. A weight has moved along its own last updates u = -m/√v (-m without v), and not along those of another tensor of
the same shape. With z(P, Q) = √n · corr(movement of P, u of Q) over n elements, means of rows and columns taken away, a
pair that has been exchanged has z(P, P) + z(Q, Q) < z(P, Q) + z(Q, P). The movement is the difference to an earlier
checkpoint of the run, where one stands beside this one; it can confirm and contradict. Without one it is the weight
itself, which can only confirm: what is left of the initial values is noise. Vectors are left out: those of norms move
alike in all layers, and back again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mupace.errors import CheckpointError
from mupace.migrate.index.model import Entry
from mupace.migrate.index.read import read_rows

SAMPLE = 32_768
"""Elements of each tensor that are read to test the order."""
FEW = 2_048
"""Elements of each tensor that are read to test the moments."""
CERTAIN = 5.0
"""Standard deviations from which a correlation is taken as real."""
CONTRADICTS = 10.0
SLACK = 100.0
"""Betas may have been changed during the run, and c with them: beyond this factor it is no longer that."""
_RIVALS = 128  # tensors of equal shape that are compared with each other at a time


def fits(tensors: Sequence[Entry], shape: tuple[int, ...]) -> bool:
    """Whether tensors can be the state of a parameter: each of its shape, or of a factored second moment of it."""
    rows, columns = shape[:-1], shape[:-2] + shape[-1:]
    factored = {rows, columns, (*rows, 1), (*shape[:-2], 1, *shape[-1:])} if len(shape) > 1 else set()
    return all(e.shape == shape or e.shape in factored or e.numel == 1 for e in tensors)


def moments(
    label: str,
    states: Mapping[str, Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> list[str]:
    """Check a few rows of every pair of Adam's moments; what was found, for people.

    Raises:
        CheckpointError: a second moment is negative or not finite, or too small for its first moment.
    """
    checked = 0
    for options, own in zip(settings, names, strict=True):
        bound = _bound(options.get("betas"))
        for name in own:
            m, v = states.get(name, {}).get("exp_avg"), states.get(name, {}).get("exp_avg_sq")
            if isinstance(m, Entry) and isinstance(v, Entry) and m.shape == v.shape and m.numel:
                _check(label, name, _rows(m, FEW), _rows(v, FEW), bound if m.dtype in ("F32", "F64") else math.inf)
                checked += 1
    return [f"the moments of {checked} entries belong to each other (v >= 0, m² <= c·v)"] if checked else []


def _bound(betas: Any) -> float:
    try:
        b1, b2 = (float(b) for b in betas)
    except (TypeError, ValueError):
        return math.inf
    return (1 - b1) ** 2 / ((1 - b2) * (1 - b1**2 / b2)) if b1 >= 0 and b1**2 < b2 < 1 else math.inf


def _check(label: str, name: str, m: torch.Tensor, v: torch.Tensor, bound: float) -> None:
    if not bool((torch.isfinite(v) & (v >= 0)).all() and torch.isfinite(m).all()):
        raise CheckpointError(f"{label}: exp_avg_sq of {name} is negative, or a moment is not finite: no state of Adam")
    # Gradients below 1e-23 have squares that float32 rounds to zero.
    if math.isfinite(bound) and bool((m * m > SLACK * bound * v + 1e-36).any()):
        raise CheckpointError(
            f"{label}: exp_avg and exp_avg_sq of {name} are not of the same tensor: m² is more than {SLACK:g} times "
            "what the betas allow"
        )


def order(
    label: str,
    states: Mapping[str, Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    weights: Mapping[str, Entry],
    earlier: tuple[str, Mapping[str, Entry]] | None,
) -> list[str]:
    """Test the order of matrices of equal shape; what was found, for people.

    Raises:
        CheckpointError: the movement since the earlier checkpoint says that two entries are exchanged.
    """
    confirmed = total = 0
    for own in _classes(names, states, weights, earlier):
        scores = _scores(own, states, weights, earlier)
        swaps = scores.diag()[:, None] + scores.diag()[None] - scores - scores.T
        swaps.fill_diagonal_(math.inf)
        better = torch.where(torch.maximum(scores, scores.T) > CONTRADICTS, swaps, math.inf)
        if earlier is not None and float(better.min()) < -CONTRADICTS:
            p, q = divmod(int(better.argmin()), len(own))
            raise CheckpointError(
                f"{label}: by the movement of the weights since {earlier[0]} the states of {own[p]} and {own[q]} are "
                "exchanged: the optimizer was built in another order; save it with model.named_parameters()"
            )
        confirmed += int(((scores.diag() > CERTAIN) & (swaps.min(1).values > CERTAIN)).sum())
        total += len(own)
    if not total:
        return []
    by = f"the movement since {earlier[0]}" if earlier else "the correlation of weights with their last updates"
    return [f"{by} confirms {confirmed} of {total} matrices of equal shape"]


def _classes(
    names: Sequence[Sequence[str]],
    states: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Entry],
    earlier: tuple[str, Mapping[str, Entry]] | None,
) -> list[list[str]]:
    """Names within a group whose matrices have the same shape, and for which all that is compared is there."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for g, own in enumerate(names):
        for name in own:
            weight, m = weights.get(name), _first(states.get(name, {}))
            if weight is None or m is None or m.shape != weight.shape or not m.numel or len(m.shape) < 2:
                continue
            if earlier is None or (name in earlier[1] and earlier[1][name].shape == weight.shape):
                found.setdefault((g, weight.shape), []).append(name)
    cut = (c[i : i + _RIVALS] for c in found.values() for i in range(0, len(c), _RIVALS))
    return [part for part in cut if len(part) > 1]


def _first(state: Mapping[str, Any]) -> Entry | None:
    value = state.get("exp_avg", state.get("momentum_buffer"))
    return value if isinstance(value, Entry) else None


def _scores(
    names: Sequence[str],
    states: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Entry],
    earlier: tuple[str, Mapping[str, Entry]] | None,
) -> torch.Tensor:
    """z of every weight (row) with the update of every entry (column)."""
    moved, updates = [], []
    for name in names:
        now = _rows(weights[name], SAMPLE)
        moved.append(_unit(now if earlier is None else now - _rows(earlier[1][name], SAMPLE)))
        updates.append(_unit(_update(states[name])))
    return torch.stack(moved) @ torch.stack(updates).T * math.sqrt(len(moved[0]))


def _update(state: Mapping[str, Any]) -> torch.Tensor:
    m, v = _first(state), state.get("exp_avg_sq")
    assert m is not None
    first = _rows(m, SAMPLE)
    if not isinstance(v, Entry) or v.shape != m.shape:
        return -first
    root = _rows(v, SAMPLE).sqrt()
    return torch.where(root > 0, -first / root.clamp_min(1e-30), 0.0)


def _unit(values: torch.Tensor) -> torch.Tensor:
    for dim in (0, 1):
        if values.shape[dim] > 1:
            values = values - values.mean(dim, keepdim=True)
    flat = values.flatten()
    norm = float(flat.norm())
    return flat / norm if norm > 0 else flat


def _rows(entry: Entry, elements: int) -> torch.Tensor:
    """Rows from the middle of a tensor, as a matrix in float64."""
    length = entry.shape[0] if entry.shape else 1
    row = entry.numel // length
    n = min(length, max(1, elements // max(row, 1)))
    start = (length - n) // 2
    values = read_rows(entry, start, start + n).reshape(n, -1).to(torch.float64)
    return values.reshape(-1, values.shape[-1]) if row > 1 else values.reshape(-1, 1)
