"""Tensors of files as parts of tensors in memory, and tensors in memory as what files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from mupace.errors import ConfigError

Span = tuple[Fraction, Fraction]

WHOLE: Span = (Fraction(0), Fraction(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A tensor of a file as a part of a tensor in memory."""

    name: str
    """The parameter or buffer in memory; of tied ones the first that `named_parameters` lists."""
    select: tuple[int | Span, ...]
    """Per dimension in memory: the index that is taken, which drops the dimension, or (start, stop) as fractions."""
    transposed: bool = False
    """Whether the last two dimensions of what is selected are exchanged in the file."""
    buffer: bool = False

    @property
    def whole(self) -> bool:
        """Whether the file has all of the tensor, as it is in memory."""
        return not self.transposed and all(part == WHOLE for part in self.select)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions in memory that the tensor of the file has, in its order."""
        kept = tuple(d for d, part in enumerate(self.select) if not isinstance(part, int))
        return (*kept[:-2], kept[-1], kept[-2]) if self.transposed else kept

    def index(self, shape: Sequence[int]) -> tuple[int | slice, ...]:
        """What to index a tensor in memory of this shape with.

        Raises:
            ConfigError: for a shape in which a fraction is no whole number of elements.
        """
        assert len(shape) == len(self.select), f"{self.name} has {len(self.select)} dimensions, not {tuple(shape)}"
        return tuple(
            part if isinstance(part, int) else slice(*(self._at(end, n) for end in part))
            for part, n in zip(self.select, shape, strict=True)
        )

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the file of a tensor that has this shape in memory."""
        parts = self.index(shape)
        return tuple(part.stop - part.start for part in (parts[d] for d in self.dims) if isinstance(part, slice))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the file, from the one in memory; it shares its storage."""
        part = tensor[self.index(tensor.shape)]
        return part.transpose(-1, -2) if self.transposed else part

    def into(self, tensor: torch.Tensor, stored: torch.Tensor) -> None:
        """Write what a file holds into its place in memory."""
        tensor[self.index(tensor.shape)] = stored.transpose(-1, -2) if self.transposed else stored

    def _at(self, end: Fraction, length: int) -> int:
        if (end * length).denominator != 1:
            raise ConfigError(f"{self.name}: {end} of {length} elements is no whole number of them")
        return int(end * length)


def compose(views: Mapping[str, View]) -> dict[str, tuple[tuple[str, View], ...]]:
    """For every tensor in memory the tensors of files that it consists of, in the order of their places.

    Raises:
        ConfigError: for tensors that overlap, or do not cover the tensor in memory as far as indices show.
    """
    found: dict[str, list[tuple[str, View]]] = {}
    for name, view in views.items():
        found.setdefault(view.name, []).append((name, view))
    for inner, parts in found.items():
        parts.sort(key=lambda item: tuple((p, p) if isinstance(p, int) else p for p in item[1].select))
        _check_tiles(inner, [view for _, view in parts])
    return {name: tuple(parts) for name, parts in found.items()}


def _check_tiles(name: str, views: Sequence[View]) -> None:
    """Boxes that are apart, and, index by index, add up to the whole."""
    groups: dict[tuple[int, ...], list[View]] = {}
    for view in views:
        groups.setdefault(tuple(part for part in view.select if isinstance(part, int)), []).append(view)
    for mine in groups.values():
        for i, view in enumerate(mine):
            if any(all(map(_meets, view.select, other.select)) for other in mine[:i]):
                raise ConfigError(f"{name}: two tensors of the files are the same part {_text(view.select)} of it")
    indices = math.prod(max(column) + 1 for column in zip(*groups, strict=True))
    total = sum(_share(view) for view in views)
    if total != indices:
        raise ConfigError(f"{name}: the files hold {float(total / indices):.3g} of it")


def _share(view: View) -> Fraction:
    """The part of the dimensions that are not dropped."""
    return math.prod((part[1] - part[0] for part in view.select if not isinstance(part, int)), start=Fraction(1))


def _meets(a: int | Span, b: int | Span) -> bool:
    return isinstance(a, int) or isinstance(b, int) or (a[0] < b[1] and b[0] < a[1])


def _text(select: Sequence[int | Span]) -> str:
    parts = (str(p) if isinstance(p, int) else ":" if p == WHOLE else f"{p[0]}:{p[1]}" for p in select)
    return f"[{', '.join(parts)}]"
