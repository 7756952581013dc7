"""Size labels: how long each dimension of each tensor is, in terms of the fields of the model's configuration.

One field at a time is changed, the model is built again on the meta device (shapes, no memory), and the lengths
that moved say which dimension depends on which field. A sum of products of fields is then fitted and must be exact
for every model that was built.

Evidence that names cannot give: a fused projection shows its segments, an expert stack its experts.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.params import ParamTable
from mupace.structure.fields import DEPTH, HEADS, HIDDEN, KV_HEADS, WIDTH, integers, last, read, scope, write
from mupace.structure.fit import Build, fitted
from mupace.structure.resize import shortened

UNEXPLAINED = "?"
Labels = dict[str, tuple[str, ...]]
Shapes = dict[str, tuple[int, ...]]

_NO_SIZE = re.compile(r".*(_id|_ids|_index|_indices|_indexes|_token|_version)(\[\d+\])?")
_COUPLED = (HIDDEN | HEADS, HEADS | KV_HEADS, HIDDEN | HEADS | KV_HEADS, WIDTH)
_SHORT = (4, 8, 16)


def label_sizes(config: Any, build: Callable[[Any], Any], table: ParamTable) -> Labels:
    """How long each dimension of each tensor is, in the configuration's own field names.

    A label is a sum of products of fields: "num_attention_heads*head_dim", "3*n_embd", "image_size^2/patch_size^2
    + 1", of a nested configuration "text_config.hidden_size". A length that no field changes is its number, "4".
    Where no such sum is exact, the label is "?"; `unexplained` lists those.

    The number of layers is not varied; a deep model is looked at with its first few layers if those show every
    name and shape of the others. Nothing is trained, allocated or changed.

    Args:
        config: the configuration of a `transformers` model.
        build: makes a model of a configuration: its class, or a function. Called on the meta device.
        table: of the model that `config` describes.

    Raises:
        ConfigError: when the configuration cannot be built, or builds other tensors than the table's.
    """
    wanted = {row.name: row.shape for row in table}
    full = _shapes(build, config)
    if isinstance(full, Exception):
        raise ConfigError(f"build: the model cannot be built from its own configuration: {_reason(full)}") from full
    wrong = next((name for name, shape in wanted.items() if full.get(name) != shape), None)
    if wrong is not None:
        raise ConfigError(f"build: {wrong} is {wanted[wrong]} in the table, and {full.get(wrong)} in what was built")
    return next(found for found in _attempts(config, build, wanted) if found is not None)


def with_sizes(model: torch.nn.Module, table: ParamTable) -> ParamTable:
    """The table of a `transformers` model with the `sizes` of every row; raises as `label_sizes`."""
    config: Any = model.config
    labels = label_sizes(config, type(model), table)
    return ParamTable(tuple(replace(row, sizes=labels[row.name]) for row in table), table.tensors)


def unexplained(labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The dimensions without a label, as "name[dimension]"."""
    return tuple(
        f"{name}[{i}]" for name, dims in labels.items() for i, label in enumerate(dims) if label == UNEXPLAINED
    )


def length(label: str, config: Any) -> int:
    """The length a label stands for under a configuration.

    Raises:
        ConfigError: for "?", a label that names no field, or a length that is no whole number.
    """
    try:
        total = sum((sign * _product(term, config) for sign, term in _terms(label)), Fraction(0))
    except (AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"label={label!r} has no length under {type(config).__name__}: {error}") from error
    if total.denominator != 1:
        raise ConfigError(f"label={label!r} is {total} under {type(config).__name__}: legal is a whole number")
    return int(total)


def _terms(label: str) -> Iterator[tuple[int, str]]:
    signed = re.split(r" ([+-]) ", f" {label}" if label.startswith("- ") else f" + {label}")[1:]
    yield from ((-1 if sign == "-" else 1, term) for sign, term in zip(signed[::2], signed[1::2], strict=True))


def _product(term: str, config: Any) -> Fraction:
    total = Fraction(1)
    if not term.strip():
        raise ValueError("it names no field")
    for sign, factor in re.findall(r"([*/]?)([^*/]+)", term):
        name, _, power = factor.partition("^")
        value = Fraction(int(name) if name.isdigit() else int(read(config, name))) ** int(power or 1)
        total = total / value if sign == "/" else total * value
    return total


def _attempts(config: Any, build: Callable[[Any], Any], wanted: Shapes) -> Iterator[Labels | None]:
    """Labels by the shortest model that shows all of the full one; None where a short one does not."""
    deepest = max((v for p, v in integers(config).items() if last(p) in DEPTH), default=0)
    for layers in (n for n in _SHORT if n < deepest):
        short = shortened(config, layers)
        shapes = _shapes(build, short)
        if not isinstance(shapes, Exception) and {*map(alike, wanted.items())} <= {*map(alike, shapes.items())}:
            yield _spread(_labels(short, build, shapes), shapes, wanted)
    yield _labels(config, build, wanted)


def alike(item: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    """What tensors of several layers have in common: the name without numbers, and the shape."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", item[0]), item[1]


def _spread(labels: Labels, shapes: Shapes, wanted: Shapes) -> Labels | None:
    """Labels of a short model for the tensors of the full one; None if tensors that look alike differ."""
    known: dict[object, tuple[str, ...]] = {}
    for item in shapes.items():
        if known.setdefault(alike(item), labels[item[0]]) != labels[item[0]]:
            return None
    return {item[0]: known[alike(item)] for item in wanted.items()}


def _labels(config: Any, build: Callable[[Any], Any], wanted: Shapes) -> Labels:
    probe = _Probe(config, build, wanted)
    probe.explore()
    memory: dict[tuple[int | None, ...], str] = {}

    def label(name: str, i: int) -> str:
        column = probe.column(name, i)
        if column not in memory:
            memory[column] = probe.label(column)
        return memory[column]

    return {name: tuple(label(name, i) for i in range(len(shape))) for name, shape in wanted.items()}


class _Probe:
    """Models of one family with other sizes, and what their tensors' lengths say."""

    def __init__(self, config: Any, build: Callable[[Any], Any], base: Shapes) -> None:
        self.config, self.make, self.base = config, build, base
        self.fields = _candidates(config)
        self.builds: list[tuple[dict[str, int], Shapes]] = [({}, base)]
        self.tried: dict[frozenset[tuple[str, int]], Shapes | None] = {}
        self.alone: dict[str, int] = {}
        """Field to the first other value with which the model can be built."""
        self.untested: tuple[str, ...] = ()

    def explore(self) -> None:
        for field in self.fields:
            self._vary(field)
        moving = [field for field in self.alone if self._moves({field})]
        for field in moving:
            self._more_values(field)
        lost = [field for field in self.fields if field not in self.alone]
        joint = {field for field in lost if self._vary_coupled(field)}
        self.untested = tuple(field for field in lost if field not in joint)
        for pair in sorted(self._pairs(moving)):
            self.at({field: self.alone[field] for field in pair})
        self.at({field: self.alone[field] for field in moving})  # held out: every label must be exact here too

    def at(self, changes: dict[str, int]) -> Shapes | None:
        """The shapes with these fields changed; None where the family refuses."""
        key = frozenset(changes.items())
        if key not in self.tried:
            shapes = self._build(changes)
            self.tried[key] = shapes
            if shapes is not None:
                self.builds.append((changes, shapes))
        return self.tried[key]

    def column(self, name: str, i: int) -> tuple[int | None, ...]:
        """One dimension in every model; None where the tensor is missing or has another rank."""
        rank = len(self.base[name])
        shapes = (shapes.get(name, ()) for _, shapes in self.builds)
        return tuple(shape[i] if len(shape) == rank else None for shape in shapes)

    def label(self, column: tuple[int | None, ...]) -> str:
        seen = [Build(c, n) for (c, _), n in zip(self.builds, column, strict=True) if n is not None]
        start = seen[0].length
        if all(build.length == start for build in seen):
            hidden = any(self.fields[field] > 1 and start % self.fields[field] == 0 for field in self.untested)
            return UNEXPLAINED if hidden and start > 1 else str(start)
        return fitted(self.fields, seen) or UNEXPLAINED

    def _build(self, changes: dict[str, int]) -> Shapes | None:
        changed = copy.deepcopy(self.config)
        try:
            for path, value in changes.items():
                write(changed, path, value)
        except Exception:  # validators have no common class; a refused value is one that is not looked at
            return None
        shapes = _shapes(self.make, changed)
        return None if isinstance(shapes, Exception) else shapes

    def _vary(self, field: str) -> None:
        for value in _others(self.fields[field]):
            if self.at({field: value}) is not None:
                self.alone[field] = value
                return

    def _more_values(self, field: str) -> None:
        found = (self.at({field: v}) for v in _others(self.fields[field]) if v != self.alone[field])
        list(itertools.islice((shapes for shapes in found if shapes is not None), 2))

    def _vary_coupled(self, field: str) -> bool:
        """Double a field together with those it must stay in proportion to; whether that could be built."""
        built = False
        for names in _COUPLED:
            group = [p for p in self.fields if scope(p) == scope(field) and (last(p) in names or p == field)]
            for factor in (2, 4):
                built |= self.at({path: factor * self.fields[path] for path in group}) is not None
            if built:
                return True
        return False

    def _moves(self, fields: set[str]) -> bool:
        return any(_differ(self.base, shapes) for changes, shapes in self.builds if changes.keys() == fields)

    def _pairs(self, moving: Sequence[str]) -> set[tuple[str, str]]:
        """Fields that move the same dimension: only those can stand in one product."""
        movers: dict[tuple[str, int], set[str]] = {}
        for changes, shapes in self.builds:
            for field in changes if len(changes) == 1 else ():
                for site in _differ(self.base, shapes):
                    movers.setdefault(site, set()).add(field)
        found = {tuple(sorted(pair)) for fields in movers.values() for pair in itertools.combinations(fields, 2)}
        return {(a, b) for a, b in found if a in moving and b in moving}


def _candidates(config: Any) -> dict[str, int]:
    """The whole numbers that may be sizes."""
    numbers = integers(config)
    labels = getattr(config, "num_labels", None)
    if isinstance(labels, int):
        numbers["num_labels"] = labels  # a property: what is stored is the list of labels
    return {
        path: value
        for path, value in numbers.items()
        if value > 0 and last(path) not in DEPTH and not _NO_SIZE.fullmatch(path)
    }


def _others(value: int) -> tuple[int, ...]:
    """Other values to try: powers of two first, so that what divides the old value divides the new."""
    half = (value // 2,) if value % 2 == 0 else ()
    return (2 * value, 4 * value, *half, 3 * value, value + 1)


def _differ(a: Shapes, b: Shapes) -> list[tuple[str, int]]:
    both = [(name, shape, b[name]) for name, shape in a.items() if len(b.get(name, ())) == len(shape)]
    return [(name, i) for name, one, two in both if one != two for i in range(len(one)) if one[i] != two[i]]


def _shapes(build: Callable[[Any], Any], config: Any) -> Shapes | Exception:
    """Name to shape, tied names included; the exception where the family refuses."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = build(copy.deepcopy(config))
        except Exception as error:  # each family refuses in its own way
            return error
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
