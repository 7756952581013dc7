"""The numbers of one tensor of the target, block by block: gather, mean, scale, fill, merge, noise.

Floating point is computed in float32, in float64 where source or target is; the result is rounded once to its dtype.
Elements that are only moved keep their bits, whatever their dtype. Every element depends on the operation, the
seed and its own place only, never on the block in which it is computed: reductions have a fixed order, and random
numbers are drawn from a counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) whose key is
the seed and the target's name and whose value is the place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mupace.migrate.axis import AxisMap, Indices
from mupace.migrate.index.model import DTYPES
from mupace.migrate.operation import Noise, Operation

Rows = Callable[[str, Indices], torch.Tensor]
"""Of a source's name and sorted indices of its first dimension: these rows, other dimensions whole, in memory that may
be overwritten. A tensor of no dimension is one row of shape (1,)."""

CELL = 4096
"""Random numbers are drawn for as many rows at a time as have this many elements together, at least one."""
CHUNK = 1 << 14
"""Elements that are summed in float64 at a time, at least one row."""


def compute(op: Operation, rows: Rows, start: int, stop: int, *, seed: int) -> torch.Tensor:
    """Rows [start, stop) of an operation's target (of shape (1,) for a tensor of no dimension)."""
    return Transform(op, rows, seed=seed).block(start, stop)


def apply(op: Operation, tensors: Mapping[str, torch.Tensor], seed: int) -> torch.Tensor:
    """The whole target of an operation whose sources are in memory; they are left as they are."""

    def rows(name: str, indices: Indices) -> torch.Tensor:
        source = tensors[name].detach()
        return (source if source.ndim else source.reshape(1)).index_select(0, torch.from_numpy(indices))

    return compute(op, rows, 0, op.shape[0] if op.shape else 1, seed=seed).reshape(op.shape)


class Transform:
    """One operation with what all its blocks share."""

    def __init__(self, op: Operation, rows: Rows, *, seed: int) -> None:
        self.op, self.rows, self.seed = op, rows, seed
        self.shape = op.shape or (1,)
        self.axes = (op.axes or (AxisMap.same(1),)) if op.source is not None else ()
        self.dtype: torch.dtype = getattr(torch, DTYPES[op.dtype][0])
        self.moved = tuple(not axis.plain for axis in self.axes)
        self.new = [axis.indices[0] < 0 for axis in self.axes]
        self.means = op.fill.kind == "mean" and any(new.any() for new in self.new)
        self.late = self.means or any(axis.pooled for axis in self.axes)
        """Whether several source elements make one: then scaling comes after the gather, else before it."""
        self.scale, self.scales = self._factors()
        self._product: tuple[torch.Tensor, torch.Tensor] | None = None
        self._row_mean: torch.Tensor | None = None

    @property
    def scaled(self) -> bool:
        """Whether elements are multiplied by anything but 1; without, the offset cancels."""
        return self.scale != 1.0 or bool(self.scales)

    @property
    def counts(self) -> bool:
        """Whether numbers are computed at all, beyond moving and rounding."""
        return self.scaled or self.late or self.op.merge is not None or self.op.noise is not None

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the target."""
        if self.op.source is None:
            out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        else:
            out = self._from_source(start, stop)
        self._fill(out, start, stop)
        return out

    def _from_source(self, start: int, stop: int) -> torch.Tensor:
        wanted = self.axes[0].indices[:, start:stop]
        needed = np.unique(wanted[wanted >= 0])
        x = self._working(self._merged(self.rows(self._source, needed), needed))
        if self.means and (wanted < 0).any():
            x = torch.cat([x, self._mean_row(x.dtype)])
        if not self.late:
            x = self._scaled(x, needed)
            x = x if self.op.noise is not None else x.to(self.dtype)
        for dim in range(1, len(self.shape)):
            x = self._along(x, dim)
        # A new row stands at the end of the block for a mean and anywhere for what `_fill` overwrites.
        at = np.where(wanted < 0, len(x) - 1, np.searchsorted(needed, wanted))
        x = _averaged(x, 0, at) if len(x) else torch.zeros((stop - start, *x.shape[1:]), dtype=x.dtype)
        if self.late:
            x = self._scaled(self._weighed(x, start, stop), slice(start, stop))
        if self.op.noise is not None:
            self._disturb(x, self.op.noise, start, stop)
        return x.to(self.dtype)

    @property
    def _source(self) -> str:
        assert self.op.source is not None
        return self.op.source

    def _working(self, x: torch.Tensor) -> torch.Tensor:
        if not self.counts:
            return x
        return x.to(torch.float64 if torch.float64 in (x.dtype, self.dtype) else torch.float32)

    def _factors(self) -> tuple[float, dict[int, NDArray[np.float64]]]:
        """The factor common to all elements, and one for each element along dimensions with uneven copies."""
        scale, scales = self.op.factor, {}
        for dim in self.op.divide:
            copies = self.axes[dim].copies
            made = copies if self.means else copies[~self.new[dim]]
            if len(made) and (made == made[0]).all():
                scale /= float(made[0]) ** self.op.power
            elif len(made):
                scales[dim] = copies.astype(np.float64) ** -self.op.power
        return scale, scales

    def _scaled(self, x: torch.Tensor, rows: Indices | slice) -> torch.Tensor:
        """(offset + x) · scale - offset; `rows` says which of the source's, or, late, of the target's these are."""
        if not self.scaled:
            return x
        if self.op.offset:
            x = x + self.op.offset
        x = x.mul_(self.scale)
        for dim, factors in self.scales.items():
            along = factors if self.late else _by_source(self.axes[dim], factors)
            along = along[rows] if dim == 0 else along
            x = x.mul_(torch.from_numpy(along).to(x.dtype).reshape(_only(dim, x.ndim)))
        return x.sub_(self.op.offset) if self.op.offset else x

    def _along(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Dimension `dim` >= 1 as the target has it."""
        if not self.moved[dim]:
            return x
        axis = self.axes[dim]
        if self.means and self.new[dim].any():
            x = torch.cat([x, _mean(x, dim)], dim)
        if not axis.pooled and not self.new[dim].any():
            return _spread(x, dim, axis)
        return _averaged(x, dim, np.where(axis.indices < 0, x.shape[dim] - 1, axis.indices))

    def _weighed(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Means that stand for new elements, times the fill's value."""
        if not self.means or self.op.fill.value == 1.0:
            return x
        x[torch.from_numpy(self._is_new(start, stop)).expand_as(x)] *= self.op.fill.value
        return x

    def _mean_row(self, dtype: torch.dtype) -> torch.Tensor:
        """Of shape (1, …): the mean over all rows of the source, summed in float64 in a fixed order."""
        if self._row_mean is None:
            length, inner = self.axes[0].source, math.prod(axis.source for axis in self.axes[1:])
            step = max(1, CHUNK // max(1, inner))
            total = np.zeros([axis.source for axis in self.axes[1:]])
            for start in range(0, length, step):
                chosen = np.arange(start, min(length, start + step), dtype=np.int64)
                part = self._working(self._merged(self.rows(self._source, chosen), chosen))
                total = total + np.add.reduce(part.to(torch.float64).numpy(), axis=0)
            self._row_mean = torch.from_numpy(np.asarray(total / length)[None]).to(dtype)
        return self._row_mean

    def _merged(self, x: torch.Tensor, rows: Indices) -> torch.Tensor:
        """x + scale · B @ A for these rows, one rank after another: a matrix product rounds as its blocking likes."""
        merge = self.op.merge
        if merge is None:
            return x
        x = self._working(x)
        if self._product is None:
            outputs = self.axes[int(merge.transposed)].source
            b = self.rows(merge.b, np.arange(outputs, dtype=np.int64)).to(x.dtype)
            a = self.rows(merge.a, np.arange(b.shape[1], dtype=np.int64)).to(x.dtype)
            self._product = (a.T, b.T) if merge.transposed else (b, a)
        left, right = self._product
        picked, summed = left[torch.from_numpy(rows)], torch.zeros_like(x)
        for k in range(len(right)):
            summed.add_(picked[:, k : k + 1] * right[k])
        return x.add_(summed.mul_(merge.scale))

    def _is_new(self, start: int, stop: int, without: int | None = None) -> NDArray[np.bool_]:
        """Whether an element has no source, broadcastable to the block; dimension `without` is not looked at."""
        found = np.zeros((1,) * len(self.shape), np.bool_)
        for dim, new in enumerate(self.new):
            if dim != without:
                found = found | (new[start:stop] if dim == 0 else new).reshape(_only(dim, len(self.shape)))
        return found

    def _fill(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Give new elements their values, in place."""
        fill = self.op.fill
        new = np.ones((1,) * len(self.shape), np.bool_) if self.op.source is None else self._is_new(start, stop)
        if not new.any() or (fill.kind == "mean" and self.op.source is not None):
            return
        mask = torch.from_numpy(new)
        if fill.kind == "constant":
            out.masked_fill_(mask, fill.value)
            return
        assert fill.kind == "normal", fill
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        drawn = self._normal("fill", start, stop, kind).mul_(fill.value).to(self.dtype)
        torch.where(mask, drawn, out, out=out)

    def _normal(self, use: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Standard normal numbers for rows [start, stop) of the target, each a function of its place."""
        inner = math.prod(self.shape[1:])
        key = hashlib.sha256(f"{self.seed}\n{use}\n{self.op.target}".encode()).digest()
        size = max(1, CELL // max(1, inner))
        out = np.empty((stop - start, inner), np.float64 if dtype == torch.float64 else np.float32)
        for cell in range(start // size, -(-stop // size)):
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big"), counter=cell << 192))
            a, b = max(start, cell * size), min(stop, (cell + 1) * size)
            if b - a == size:
                generator.standard_normal(out=out[a - start : b - start], dtype=out.dtype)
            else:
                drawn = generator.standard_normal((size, inner), out.dtype)
                out[a - start : b - start] = drawn[a - cell * size : b - cell * size]
        return torch.from_numpy(out).reshape(stop - start, *self.shape[1:])

    def _disturb(self, x: torch.Tensor, noise: Noise, start: int, stop: int) -> None:
        """Add noise of a share of each row's root mean square, in place."""
        level = self._rms(x, start, stop).mul_(noise.level).to(x.dtype)
        if noise.dim == 0:
            z = self._between_rows(noise, start, stop, x.dtype)
        else:
            z = self._normal("noise", start, stop, x.dtype)
            _shared(z, noise.dim, self.axes[noise.dim].indices[0], noise.kind)
        z.masked_fill_(torch.from_numpy(self._is_new(start, stop, without=noise.dim)), 0.0)
        x.add_(z.mul_(level.reshape(-1, *_only(0, x.ndim)[1:])))

    def _between_rows(self, noise: Noise, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """The noise of rows whose copies are rows too, and may stand in other blocks."""
        sources = self.axes[0].indices[0]
        wanted = sources[start:stop]
        members = np.flatnonzero(np.isin(sources, wanted[wanted >= 0]) | _inside(len(sources), start, stop))
        z = torch.cat([self._normal("noise", a, b, dtype) for a, b in runs(members)])
        _shared(z, 0, sources[members], noise.kind)
        first = int(np.searchsorted(members, start))
        return z[first : first + stop - start]

    def _rms(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Of shape (rows,), float64: the root mean square of what each row has from the source."""
        kept = x.reshape(len(x), -1)
        old = ~np.broadcast_to(self._is_new(0, 0, without=0), (1, *self.shape[1:])).reshape(-1)
        kept = kept if old.all() else kept[:, torch.from_numpy(old)]
        found = np.empty(len(kept))
        step = max(1, CHUNK // max(1, kept.shape[1]))
        for a in range(0, len(kept), step):
            part = kept[a : a + step].to(torch.float64).numpy()
            found[a : a + step] = np.sqrt(np.add.reduce(np.square(part), axis=1) / max(1, part.shape[1]))
        return torch.from_numpy(found)


def runs(indices: Indices) -> Iterator[tuple[int, int]]:
    """[start, stop) of every stretch of successive numbers."""
    if len(indices):
        cuts = np.flatnonzero(np.diff(indices) != 1) + 1
        for first, last in zip((0, *cuts), (*cuts, len(indices)), strict=True):
            yield int(indices[first]), int(indices[last - 1]) + 1


def _shared(z: torch.Tensor, dim: int, sources: Indices, kind: str) -> None:
    """Make numbers into noise in place: what copies of one source element get depends on its kind."""
    order = np.argsort(sources, kind="stable")
    _, first, counts = np.unique(sources[order], return_index=True, return_counts=True)
    alone = np.concatenate([order[first[counts == 1]], np.flatnonzero(sources < 0)])
    z.index_fill_(dim, torch.from_numpy(alone), 0.0)
    for count in np.unique(counts[counts > 1]):
        starts = first[counts == count]
        starts = starts[sources[order[starts]] >= 0]
        places = [torch.from_numpy(order[starts + copy]) for copy in range(count)]
        drawn = [z.index_select(dim, place) for place in places]
        if kind == "zero_sum":
            mean = sum(drawn[1:], drawn[0].clone()) / count
            drawn = [numbers - mean for numbers in drawn]
        elif kind == "paired":
            drawn = [-drawn[copy - 1] if copy % 2 else drawn[copy] for copy in range(count)]
        for place, numbers in zip(places, drawn, strict=True):
            z.index_copy_(dim, place, numbers)


def _averaged(x: torch.Tensor, dim: int, at: Indices) -> torch.Tensor:
    """Of indices of shape (m, target): the mean of m elements; where they are one and the same, that one."""
    if len(at) == 1:
        return _take(x, dim, at[0])
    total = _take(x, dim, at[0])
    total = total.clone() if total is x else total
    for places in at[1:]:
        total = total.add_(_take(x, dim, places))
    total = total.div_(len(at))
    alone = np.flatnonzero((at == at[0]).all(0))
    return total.index_copy_(dim, torch.from_numpy(alone), _take(x, dim, at[0][alone])) if len(alone) else total


def _take(x: torch.Tensor, dim: int, places: Indices) -> torch.Tensor:
    if len(places) == x.shape[dim] and (places == np.arange(len(places))).all():
        return x
    bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    return torch.from_numpy(np.take(bits.numpy(), places, axis=dim)).view(x.dtype)


def _spread(x: torch.Tensor, dim: int, axis: AxisMap) -> torch.Tensor:
    """A gather without means or new elements. Copies are written one after another, which is faster than a look-up."""
    parts = [part for part in axis.segments if not isinstance(part, int)]
    if any(f.kind not in ("", "x") for part in parts for f in part) or any(
        sum(f.kind == "x" for f in part) > 1 for part in parts
    ):
        return _take(x, dim, axis.indices[0])
    out = torch.empty((*x.shape[:dim], axis.target, *x.shape[dim + 1 :]), dtype=x.dtype)
    read = written = 0
    for part in parts:
        kinds = [f.kind for f in part]
        last = kinds.index("x") if "x" in kinds else len(part) - 1
        outer, inner = (math.prod(f.size for f in half) for half in (part[: last + 1], part[last + 1 :]))
        copies, size = part[last].number, outer * inner
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        source = x.narrow(dim, read, size).view(*before, outer, inner, *after)
        target = out.narrow(dim, written, size * copies).view(*before, outer, copies, inner, *after)
        for copy in range(copies):
            target.select(dim + 1, copy).copy_(source)
        read, written = read + size, written + size * copies
    return out


def _by_source(axis: AxisMap, factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of target elements as factors of the source elements they are made from, all of them alike."""
    found, first = np.ones(axis.source), axis.indices[0]
    found[first[first >= 0]] = factors[first >= 0]
    return found


def _mean(x: torch.Tensor, dim: int) -> torch.Tensor:
    total = np.add.reduce(x.to(torch.float64).numpy(), axis=dim, keepdims=True)
    return torch.from_numpy(total / x.shape[dim]).to(x.dtype)


def _inside(length: int, start: int, stop: int) -> NDArray[np.bool_]:
    found = np.zeros(length, np.bool_)
    found[start:stop] = True
    return found


def _only(dim: int, ndim: int) -> Sequence[int]:
    """The shape of a vector along one dimension of many."""
    return tuple(-1 if d == dim else 1 for d in range(ndim))
