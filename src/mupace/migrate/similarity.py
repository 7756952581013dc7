"""How alike two tensors are, and which pairing of many is clearly the best.

Names, axes and weights each speak for a pair; the order of registration may speak against one, never for one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mupace.errors import ConfigError
from mupace.params import Param, ParamTable

Side = Literal["source", "target"]
Matrix = NDArray[np.float64]

MARGIN = 0.4
"""A pair is taken if the best pairing without it costs this much more."""
ALONE = 0.9
"""What it costs to leave one target and one source without a counterpart."""
_IMPOSSIBLE = 1e3

_ORDER, _PLACE, _ROLE, _WEIGHTS = 0.3, 0.5, 0.1, 3.0
_QUANTILES = 9
_POWER_STEPS = 20
_SATURATED = 0.05
"""Profiles that differ by 5 % (root mean square of the logarithms) are those of unrelated tensors."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What is typical of a tensor's values, whatever its scale and the order of its neurons."""

    values: tuple[float, ...]


Profiler = Callable[[str, Side], Profile | None]


def profile_of(tensor: torch.Tensor, axes: Sequence[str] = ()) -> Profile | None:
    """Quantiles of the norms of rows and of columns, and an estimate of the spectral norm, each over its mean square.

    With W of shape (n, m) and F its Frobenius norm: quantiles of |W_i,:| √n / F and of |W_:,j| √m / F, and σ₁ √n / F
    with σ₁ from a power iteration. Copies of neurons side by side leave all but the interpolation as it is.

    Args:
        tensor: weights, read once, computed in float64.
        axes: what each dimension is for; the produced one becomes the rows, so that a transposed tensor has the
            profile of the original.

    Returns:
        None where the values say nothing: a constant tensor, one element, no values (meta).
    """
    if tensor.is_meta or tensor.numel() < 2:
        return None
    w = _produced_first(tensor.detach().to(torch.float64), axes)
    if bool((w == w.flatten()[0]).all()):
        return None
    if w.ndim < 2:
        return Profile(tuple(_quantiles(w.abs() / w.square().mean().sqrt())))
    w = w.reshape(w.shape[0], -1)
    scale = w.norm()
    rows, columns = w.norm(dim=1), w.norm(dim=0)
    spread = [_quantiles(rows * len(rows) ** 0.5 / scale), _quantiles(columns * len(columns) ** 0.5 / scale)]
    return Profile((*spread[0], *spread[1], _spectral(w, columns) * len(rows) ** 0.5 / float(scale)))


def _produced_first(tensor: torch.Tensor, axes: Sequence[str]) -> torch.Tensor:
    return tensor.movedim(list(axes).index("out"), 0) if "out" in axes and tensor.ndim == len(axes) else tensor


def _quantiles(values: torch.Tensor) -> list[float]:
    at = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
    if len(values) > 1 << 20:  # the limit of torch.quantile is above
        values = values.sort().values[:: len(values) >> 20]
    found: list[float] = torch.quantile(values.contiguous(), at).tolist()
    return found


def _spectral(w: torch.Tensor, start: torch.Tensor) -> float:
    """The largest singular value; from the norms of the columns, as they move with the columns."""
    v = start / start.norm()
    for _ in range(_POWER_STEPS):
        v = w.T @ (w @ v)
        v = v / v.norm()
    return float((w @ v).norm())


def profiles(source: ParamTable, target: ParamTable) -> Profiler:
    """Profiles of the tensors of two live models, each computed once."""

    @cache
    def profile(name: str, side: Side) -> Profile | None:
        table = source if side == "source" else target
        tensor = table.tensors.get(name)
        return None if tensor is None else profile_of(tensor, table[name].axes)

    return profile


def unlikeness(a: Profile, b: Profile) -> float:
    """From 0 (the same) to 1 (no more alike than unrelated tensors)."""
    if len(a.values) != len(b.values):
        return 1.0
    x, y = (np.log(np.maximum(np.array(p.values), 1e-6)) for p in (a, b))
    return min(1.0, float(np.sqrt(np.mean((x - y) ** 2))) / _SATURATED)


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SAY_NOTHING = frozenset(("weight", "bias", "model", "module", "linear", "layer", "self"))
_SAME: Mapping[str, str] = {
    **dict.fromkeys(("attn", "attention"), "attention"),
    **dict.fromkeys(("ln", "layernorm", "rmsnorm", "norm"), "norm"),
    **dict.fromkeys(("embed", "embeds", "embedding", "embeddings", "emb", "embd"), "embedding"),
    **dict.fromkeys(("mlp", "ffn", "ff", "feedforward"), "ffn"),
    **dict.fromkeys(("pos", "position", "positions"), "position"),
    **dict.fromkeys(("output", "out"), "out"),
    **dict.fromkeys(("input", "in"), "in"),
    **dict.fromkeys(("query", "q"), "q"),
    **dict.fromkeys(("key", "k"), "k"),
    **dict.fromkeys(("value", "v"), "v"),
    **dict.fromkeys(("first", "1"), "1"),
    **dict.fromkeys(("second", "2"), "2"),
}
"""Words that mean the same in a name."""


def words(name: str) -> frozenset[str]:
    """The words of a name that may tell it from others, `self_attn.q_proj.weight` -> {attention, q, proj}."""
    found = (_SAME.get(word.lower(), word.lower()) for word in _WORD.findall(name))
    return frozenset(word for word in found if word not in _SAY_NOTHING)


def telling(names: Sequence[str]) -> list[frozenset[str]]:
    """The words of each name without those that all of several have."""
    found = [words(name) for name in names]
    shared = frozenset.intersection(*found) if len(found) > 1 else frozenset[str]()
    return [each - shared for each in found]


def word_distance(a: frozenset[str], b: frozenset[str]) -> float:
    """1 - 2 |a ∩ b| / (|a| + |b|): Dice's distance, 0 for the same words."""
    return 1.0 - 2.0 * len(a & b) / (len(a) + len(b)) if a or b else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What speaks against a pair."""

    names: float = 0.0
    weights: float | None = None
    axes: float = 0.0
    place: float = 0.0
    role: float = 0.0
    order: float = 0.0
    never: str = ""
    """Why it cannot be."""

    @property
    def unordered(self) -> float:
        """All of it but the order of registration."""
        if self.never:
            return _IMPOSSIBLE
        said = self.names if self.weights is None else (self.names + _WEIGHTS * self.weights) / (1 + _WEIGHTS)
        return said + self.axes + _PLACE * self.place + _ROLE * self.role

    @property
    def total(self) -> float:
        """A mean of names and weights (these three times), plus the others; order counts where no weights speak."""
        return self.unordered + (_ORDER * self.order if self.weights is None else 0.0)

    def __str__(self) -> str:
        if self.never:
            return self.never
        named = (("names", self.names), ("weights", self.weights), ("axes", self.axes), ("place", self.place))
        more = (("role", self.role), ("order", self.order))
        said = [f"{word} {value:.2f}" for word, value in (*named, *more) if value or word == "names"]
        return f"cost {self.total:.2f}: {', '.join(said)}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tensor of one side, as costs see it."""

    row: Param
    name: str
    """Without what names its block."""
    hidden: int | None
    """The width of its model's residual stream."""


def costs(
    targets: Sequence[Candidate], sources: Sequence[Candidate], profile: Profiler | None = None
) -> list[list[Cost]]:
    """What speaks against each pair, one row for each target."""
    ours, theirs = telling([c.name for c in targets]), telling([c.name for c in sources])
    return [
        [
            _cost(t, s, word_distance(ours[i], theirs[j]), abs(_rank(i, targets) - _rank(j, sources)), profile)
            for j, s in enumerate(sources)
        ]
        for i, t in enumerate(targets)
    ]


def _rank(i: int, among: Sequence[object]) -> float:
    return i / (len(among) - 1) if len(among) > 1 else 0.0


def _cost(t: Candidate, s: Candidate, names: float, order: float, profile: Profiler | None) -> Cost:
    never = incompatible(t.row, s.row)
    if never:
        return Cost(names=names, never=never)
    both = (profile(t.row.name, "target"), profile(s.row.name, "source")) if profile is not None else (None, None)
    ours, theirs = signature(t.row, t.hidden), signature(s.row, s.hidden)
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Cost(
        names=names,
        weights=None if both[0] is None or both[1] is None else unlikeness(both[0], both[1]),
        axes=differ / max(1, len(ours)),
        place=float(t.row.place != s.row.place),
        role=float(t.row.role != s.row.role),
        order=order,
    )


def incompatible(target: Param, source: Param) -> str:
    """Why one can never be made from the other, "" if nothing forbids it."""
    if len(target.shape) != len(source.shape):
        return f"{len(source.shape)} dimensions, not {len(target.shape)}"
    if target.axes and source.axes and sorted(target.axes) != sorted(source.axes):
        return f"axes {'×'.join(source.axes)}, not {'×'.join(target.axes)}"
    vague = {"linear", "unknown"} & {target.role, source.role} and not {"norm", "bias"} & {target.role, source.role}
    return "" if target.role == source.role or vague else f"role {source.role}, not {target.role}"


def signature(row: Param, hidden: int | None) -> tuple[tuple[str, bool], ...]:
    """What each dimension is for, and whether one that carries features is as long as the residual stream.

    Transposed tensors have the same.
    """
    axes = row.axes if len(row.axes) == len(row.shape) else ("",) * len(row.shape)
    wide = [axis in ("out", "in") and length == hidden for axis, length in zip(axes, row.shape, strict=True)]
    return tuple(sorted(zip(axes, wide, strict=True)))


def hidden_size(table: ParamTable) -> int | None:
    """The width of the residual stream: the commonest length of a gain, else of an embedding; None without either."""
    for role in ("norm", "embedding"):
        lengths = [row.shape[-1] for row in table if row.role == role and row.shape]
        if lengths:
            return max(dict.fromkeys(lengths), key=lengths.count)
    return None


def assignment(cost: Matrix, alone: float = ALONE) -> tuple[list[int | None], list[float]]:
    """The pairing of least cost, and for each row how much the best pairing without its pair costs more.

    A row and a column may both be left alone, at half of `alone` each. Exact: shortest augmenting paths (Kuhn, "The
    Hungarian method for the assignment problem", 1955), O(N³); the margin of a row is the cheapest cycle of exchanges
    that it takes part in, by Floyd and Warshall's shortest paths.

    Args:
        cost: of shape (n, m), finite.
        alone: what it costs to leave a pair apart.

    Returns:
        Column or None for each row, and its margin.
    """
    n, m = cost.shape
    padded = np.zeros((n + m, n + m))
    padded[:n, :m] = cost
    padded[:n, m:] = padded[n:, :m] = alone / 2
    columns = _least(padded)
    margins = _margins(padded, columns)
    return [int(j) if j < m else None for j in columns[:n]], [float(value) for value in margins[:n]]


def _least(cost: Matrix) -> NDArray[np.int64]:
    """The column of each row in the cheapest complete pairing of a square matrix."""
    size = len(cost)
    rows, u, v = np.full(size + 1, -1), np.zeros(size), np.zeros(size + 1)  # the last column is where a path starts
    for i in range(size):
        rows[size], at = i, size
        least, previous, seen = np.full(size, np.inf), np.full(size, size), np.zeros(size + 1, bool)
        while rows[at] != -1:
            seen[at] = True
            row = rows[at]
            reduced = cost[row] - u[row] - v[:size]
            better = ~seen[:size] & (reduced < least)
            least[better], previous[better] = reduced[better], at
            following = int(np.argmin(np.where(seen[:size], np.inf, least)))
            step = least[following]
            u[rows[seen]] += step
            v[seen] -= step
            least[~seen[:size]] -= step
            at = following
        while at != size:
            rows[at] = rows[previous[at]]
            at = int(previous[at])
    return np.argsort(rows[:size])


def _margins(cost: Matrix, columns: NDArray[np.int64]) -> Matrix:
    taken = cost[:, columns]  # what row i pays for row j's column
    exchange = taken - np.diag(taken)[:, None]
    np.fill_diagonal(exchange, np.inf)
    shortest = exchange.copy()
    for k in range(len(cost)):
        shortest = np.minimum(shortest, shortest[:, k : k + 1] + shortest[k : k + 1, :])
    return np.diag(shortest)


def clear_pairs(found: Sequence[Sequence[Cost]]) -> dict[int, tuple[int, float]]:
    """Row to column and margin, for the rows whose pair is clearly the best.

    The pair must be in the cheapest pairing with the order of registration and without it, by `MARGIN` in both: order
    alone decides nothing, and can take away what names say weakly. Where both sides have as many, it is all or none:
    names that explain some of a group and not the others do not explain it.
    """
    if not found or not found[0]:
        return {}
    readings = [np.array([[getattr(c, kind) for c in row] for row in found]) for kind in ("total", "unordered")]
    (first, one), (second, two) = (assignment(cost) for cost in readings)
    margins = [min(pair) for pair in zip(one, two, strict=True)]
    clear = {
        i: (column, margins[i])
        for i, column in enumerate(first)
        if column is not None and column == second[i] and margins[i] > MARGIN
    }
    return clear if len(found) != len(found[0]) or len(clear) == len(found) else {}


def similar_weights(
    source: ParamTable, target: ParamTable, profile: Profiler, *, stack: str | None = None
) -> tuple[int, ...]:
    """Which source layer each target layer is, by the profiles of their tensors alone: for layers in another order.

    Args:
        source, target: tables whose tensors `profile` can read.
        profile: such as `profiles(source, target)`.
        stack: of a model with several; both sides name it the same.

    Raises:
        ConfigError: for a target layer that no source layer is clearly alike.
    """
    ours, theirs = (_layer_rows(table, stack) for table in (target, source))
    if not ours or not theirs:
        raise ConfigError(f"stack={stack!r} has no layers in both models: legal are those of {list(target.depths)}")
    cost = np.array([[_layer_cost(t, s, profile) for s in theirs] for t in ours])
    columns, margins = assignment(cost, alone=1.0)
    for i, (column, margin) in enumerate(zip(columns, margins, strict=True)):
        if column is None or margin <= MARGIN:
            near = ", ".join(f"{j} ({cost[i, j]:.2f})" for j in np.argsort(cost[i])[:3])
            raise ConfigError(
                f"target layer {i} is like no source layer by its weights: nearest are {near}; give layers="
            )
    return tuple(column for column in columns if column is not None)


def _layer_rows(table: ParamTable, stack: str | None) -> list[dict[tuple[str, int], str]]:
    """For each layer: (role, order among those of the role) to name."""
    found: list[dict[tuple[str, int], str]] = [{} for _ in range(table.depths.get(stack, 0))]
    for row in table:
        if row.block is not None and row.stack == stack:
            layer = found[row.block]
            layer[row.role, sum(role == row.role for role, _ in layer)] = row.name
    return found


def _layer_cost(
    target: Mapping[tuple[str, int], str], source: Mapping[tuple[str, int], str], profile: Profiler
) -> float:
    both = [(profile(target[key], "target"), profile(source[key], "source")) for key in target if key in source]
    known = [unlikeness(t, s) for t, s in both if t is not None and s is not None]
    return float(np.mean(known)) if known else 1.0
