"""How one dimension of a tensor is made from one dimension of another: which source element stands where, how often.

    axis    := segment (" + " segment)*           segments follow one another in both dimensions
    segment := factor (" . " factor)* | "new" N   factors are nested, the outermost first
    factor  := SIZE | SIZE "x" K | SIZE "/" K | SIZE "~" N | SIZE "@" RANGES

"64" is left as it is; "64 x2" has every element twice, side by side; "2 x2 . 2 . 8" doubles the groups of a dimension
of 2 groups of 2 heads of size 8; "16 x2 + 8 x2 + 8 x2" doubles each of three packed segments; "8 /2" is the mean of
neighbouring pairs; "64 ~96" spreads 64 over 96, some twice; "64 + new 8" has 8 elements that no source element makes;
"12 @0-3,8-11" takes those listed, in that order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError

Indices = NDArray[np.int64]

_FACTOR = re.compile(r"(\d+)(?:\s*([x/~])\s*(\d+)|\s*@\s*([\d,\s-]+))?")
_LEGAL = "legal are sizes such as '64', '64 x2', '2 x2 . 8', '8 /2', '64 ~96', '64 + new 8', '12 @0-3,8-11'"


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a segment: `size` source elements, and what becomes of them."""

    size: int
    kind: str = ""
    """"" (as they are), "x" (copied), "/" (averaged), "~" (spread), "@" (chosen)."""
    number: int = 1
    chosen: tuple[int, ...] = ()

    def indices(self) -> Indices:
        """Of shape (m, target): the source elements whose mean each target element is."""
        every = np.arange(self.size, dtype=np.int64)
        if self.kind == "x":
            return np.repeat(every, self.number)[None]
        if self.kind == "/":
            return np.ascontiguousarray(every.reshape(-1, self.number).T)
        if self.kind == "~":
            return (np.arange(self.number, dtype=np.int64) * self.size // self.number)[None]
        return np.array(self.chosen, np.int64)[None] if self.kind == "@" else every[None]

    def __str__(self) -> str:
        if self.kind == "@":
            return f"{self.size} @{_ranges(self.chosen)}"
        return f"{self.size} {self.kind}{self.number}" if self.kind else str(self.size)


@dataclass(frozen=True)
class AxisMap:
    """One dimension; `parse` reads the text form, `str` gives it back."""

    segments: tuple[tuple[Factor, ...] | int, ...]
    """Factors, or a number of new elements."""
    text: str = field(compare=False, default="")

    @classmethod
    def parse(cls, text: str) -> AxisMap:
        """Read the text form.

        Raises:
            ConfigError: for text that is none, or a factor that does not divide its size.
        """
        return cls(tuple(_segment(part.strip(), text) for part in text.split("+")), text)

    @classmethod
    def same(cls, size: int) -> AxisMap:
        """The dimension as it is."""
        return cls(((Factor(size),),))

    def __str__(self) -> str:
        return self.text or " + ".join(
            f"new {part}" if isinstance(part, int) else " . ".join(map(str, part)) for part in self.segments
        )

    @cached_property
    def indices(self) -> Indices:
        """Of shape (m, target): the source elements whose mean each target element is; -1 for a new one."""
        parts, start = [], 0
        for segment in self.segments:
            if isinstance(segment, int):
                parts.append(np.full((1, segment), -1, np.int64))
                continue
            parts.append(_nested(segment) + start)
            start += math.prod(factor.size for factor in segment)
        rows = max(len(part) for part in parts)
        return np.concatenate([np.broadcast_to(part, (rows, part.shape[1])) for part in parts], axis=1)

    @cached_property
    def copies(self) -> Indices:
        """Per target element: how many target elements are made from the same source element; 1 for a new one."""
        first = self.indices[0]
        counts = np.bincount(first[first >= 0], minlength=self.source)
        return np.where(first >= 0, counts[first], 1)

    @property
    def source(self) -> int:
        """Length of the source's dimension."""
        return sum(math.prod(f.size for f in part) for part in self.segments if not isinstance(part, int))

    @cached_property
    def target(self) -> int:
        """Length of the target's dimension."""
        return int(self.indices.shape[1])

    @property
    def plain(self) -> bool:
        """Whether nothing happens."""
        return (
            self.source == self.target and not self.pooled and bool((self.indices[0] == np.arange(self.source)).all())
        )

    @property
    def pooled(self) -> bool:
        """Whether means are taken."""
        return len(self.indices) > 1

    @property
    def even(self) -> bool:
        """Whether every source element is used equally often."""
        used = self.indices[0][self.indices[0] >= 0]
        counts = np.bincount(used, minlength=self.source)
        return bool((counts == counts[0]).all())


def compressed(indices: Sequence[int] | Indices, source: int, *, cuts: Sequence[int] = ()) -> AxisMap:
    """The shortest axis that maps these source elements, one for each target element, -1 for new ones.

    Args:
        indices: of length target.
        source: length of the source's dimension.
        cuts: places in the target where one packed part ends and the next begins.
    """
    wanted = np.asarray(indices, np.int64)
    kept = wanted[wanted >= 0]
    new = len(wanted) - len(kept)
    if new and (wanted[len(kept) :] != -1).any():
        raise AssertionError("new elements stand at the end")
    bounds = sorted({0, len(kept), *(cut for cut in cuts if 0 < cut < len(kept))})
    whole = _factored(kept, source)
    parts: list[tuple[Factor, ...]] | None = None if whole is None else [whole]
    if parts is None and len(bounds) > 2:
        parts = _packed(kept, bounds)
    if parts is None or sum(math.prod(f.size for f in part) for part in parts) != source:
        parts = [(Factor(source, "@", 1, tuple(int(i) for i in kept)),)]
    made = AxisMap((*parts, new) if new else tuple(parts))
    assert (made.indices[0] == wanted).all()
    return made


def _packed(kept: Indices, bounds: Sequence[int]) -> list[tuple[Factor, ...]] | None:
    parts, start = [], 0
    for a, b in pairwise(bounds):
        piece = kept[a:b] - start
        size = int(piece.max()) + 1
        found = _factored(piece, size) if piece.min() == 0 else None
        if found is None:
            return None
        parts.append(found)
        start += size
    return parts


def _factored(kept: Indices, source: int) -> tuple[Factor, ...] | None:
    """Nested factors that give these elements; None if none do."""
    target = len(kept)
    if target == source and (kept == np.arange(source)).all():
        return (Factor(source),)
    if target % source:
        return None
    # Copies of the innermost unit lie side by side: the unit is the first run of consecutive elements that repeats.
    for unit in (n for n in range(1, source + 1) if source % n == 0):
        found = _with_unit(kept, source, unit)
        if found is not None:
            return found
    return None


def _with_unit(kept: Indices, source: int, unit: int) -> tuple[Factor, ...] | None:
    """Units of consecutive elements that are copied whole, in one or two nested factors."""
    blocks = kept.reshape(-1, unit)
    if (blocks != blocks[:, :1] + np.arange(unit)).any() or (blocks[:, 0] % unit).any():
        return None
    outer, n = blocks[:, 0] // unit, source // unit
    tail = (Factor(unit),) if unit > 1 else ()
    for group in (g for g in range(1, n + 1) if n % g == 0):
        for k in (k for k in range(1, len(outer) // n + 1) if len(outer) % (n * k) == 0):
            pair = (_copied(group, k), _copied(n // group, len(outer) // (n * k)))
            tried = [factor for factor in pair if factor.size > 1 or factor.kind]
            if tried and (_nested(tried)[0] == outer).all():
                return (*_merged(tried), *tail)
    return None


def _copied(size: int, k: int) -> Factor:
    return Factor(size, "x", k) if k > 1 else Factor(size)


def _merged(factors: Sequence[Factor]) -> list[Factor]:
    """Neighbouring factors that are left alone are one."""
    found: list[Factor] = []
    for factor in factors:
        if found and not found[-1].kind and not factor.kind:
            found[-1] = Factor(found[-1].size * factor.size)
        else:
            found.append(factor)
    return found


def _nested(segment: Sequence[Factor]) -> Indices:
    found = np.zeros((1, 1), np.int64)
    for factor in segment:
        inner = factor.indices()
        joined = found[:, None, :, None] * factor.size + inner[None, :, None, :]
        found = joined.reshape(len(found) * len(inner), -1)
    return found


def _segment(text: str, whole: str) -> tuple[Factor, ...] | int:
    new = re.fullmatch(r"new\s+(\d+)", text)
    if new:
        return int(new[1])
    return tuple(_factor(part.strip(), whole) for part in text.split("."))


def _factor(text: str, whole: str) -> Factor:
    match = _FACTOR.fullmatch(text)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"axes={whole!r}: {text!r} is no factor; {_LEGAL}")
    size, kind, number = int(match[1]), match[2] or "", int(match[3] or 1)
    if match[4] is not None:
        chosen = tuple(_chosen(match[4], whole))
        if any(i >= size for i in chosen):
            raise ConfigError(f"axes={whole!r}: {max(chosen)} is beyond the {size} elements; legal are 0 to {size - 1}")
        return Factor(size, "@", 1, chosen)
    if (kind and number < 1) or (kind == "/" and size % number):
        raise ConfigError(f"axes={whole!r}: {text!r}: legal is a number from 1 on that divides {size}")
    if kind == "~" and number < size:
        raise ConfigError(f"axes={whole!r}: {text!r} leaves elements out; legal is a length of {size} or more")
    return Factor(size, kind, number)


def _chosen(text: str, whole: str) -> list[int]:
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError(f"axes={whole!r}: {part!r} is no range; {_LEGAL}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _ranges(chosen: Sequence[int]) -> str:
    parts, start = [], 0
    for i in range(1, len(chosen) + 1):
        if i == len(chosen) or chosen[i] != chosen[i - 1] + 1:
            parts.append(str(chosen[start]) if i - start == 1 else f"{chosen[start]}-{chosen[i - 1]}")
            start = i
    return ",".join(parts)
