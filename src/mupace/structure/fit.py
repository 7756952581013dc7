"""Which sum of products of fields gives a length, exactly, for every model that was built."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Monomial = tuple[tuple[str, int], ...]
"""Fields with their exponents, in the configuration's order; () is the constant 1."""

_TERMS = 4
_FACTORS = 4
_POWERS = (1, -1, 2, -2)
_LIMIT = 20_000  # sums tried for one length, which takes about a second
_POOL = 40  # the shortest products, of which sums of three and four are made
_FINEST = 64  # the largest denominator of a weight


@dataclass(frozen=True, slots=True)
class Build:
    """One length in one model."""

    changes: Mapping[str, int]
    """Fields that differ from the base model, with their values."""
    length: int


def fitted(fields: Mapping[str, int], builds: Sequence[Build]) -> str | None:
    """The shortest sum of products that is exact for every build; None when there is none.

    Args:
        fields: name to base value of all fields.
        builds: the base model first.
    """
    moving = _moving(fields, builds)
    rows = [{**{name: fields[name] for name in moving}, **_only(build.changes, moving)} for build in builds]
    lengths = [build.length for build in builds]
    rows, lengths = _distinct(rows, lengths)
    if not rows:
        return None
    for terms in itertools.islice(_sums(_monomials(fields, moving, builds)), _LIMIT):
        weights = _exact(terms, rows, lengths)
        if weights:
            return _written(terms, weights, moving)
    return None


def _only(changes: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    return {name: value for name, value in changes.items() if name in names}


def _moving(fields: Mapping[str, int], builds: Sequence[Build]) -> list[str]:
    """Fields that move the length, alone or, where they were never varied alone, with others."""
    start = builds[0].length
    varied = {name for build in builds if len(build.changes) == 1 for name in build.changes}
    moved = {
        name
        for build in builds
        if build.length != start
        for name in build.changes
        if len(build.changes) == 1 or name not in varied
    }
    return [name for name in fields if name in moved]


def _distinct(rows: list[dict[str, int]], lengths: list[int]) -> tuple[list[dict[str, int]], list[int]]:
    """Each combination of values once; nothing if one of them has two lengths, as then another field has a say."""
    found: dict[tuple[int, ...], int] = {}
    for row, length in zip(rows, lengths, strict=True):
        if found.setdefault(tuple(row.values()), length) != length:
            return [], []
    return [dict(zip(rows[0], key, strict=True)) for key in found], list(found.values())


def _monomials(fields: Mapping[str, int], moving: Sequence[str], builds: Sequence[Build]) -> list[Monomial]:
    """Products of fields whose effects do not just add, by length; the constant is the shortest."""
    powers = {name: _powers_of(name, fields[name], builds) for name in moving}
    together = _interacting(moving, builds)
    found: list[Monomial] = [()]
    for count in range(1, _FACTORS + 1):
        for names in itertools.combinations(moving, count):
            if all(pair in together for pair in itertools.combinations(names, 2)):
                for chosen in itertools.product(*(powers[name] for name in names)):
                    found.append(tuple(zip(names, chosen, strict=True)))
    return sorted(found, key=_cost)


def _cost(monomial: Monomial) -> int:
    return sum(abs(power) + (power < 0) for _, power in monomial)


def _powers_of(name: str, value: int, builds: Sequence[Build]) -> tuple[int, ...]:
    """The exponents for which length = a·field^power + b, varying this field alone; any where none fits."""
    start = builds[0].length
    points = [(build.changes[name], build.length) for build in builds if build.changes.keys() == {name}]
    fits = []
    for power in _POWERS:
        base = Fraction(value) ** power
        slopes = {(y - start) / (Fraction(x) ** power - base) for x, y in points}
        fits += [power] if len(slopes) <= 1 else []
    return tuple(fits) or _POWERS


def _interacting(moving: Sequence[str], builds: Sequence[Build]) -> set[tuple[str, str]]:
    """Pairs whose joint effect is not the sum of the two; also those that were never built together."""
    found = {tuple(sorted(build.changes.items())): build.length for build in builds}
    start = builds[0].length
    pairs = set()
    for a, b in itertools.combinations(moving, 2):
        joint = next((build for build in builds if build.changes.keys() == {a, b}), None)
        single = [found.get(((name, joint.changes[name]),)) for name in (a, b)] if joint is not None else [None]
        if joint is None or None in single or joint.length - start != sum(n - start for n in single if n is not None):
            pairs.add((a, b))
    return pairs


def _sums(monomials: Sequence[Monomial]) -> Iterator[tuple[Monomial, ...]]:
    """One product, then two, up to four; the short ones first."""
    for count in range(1, _TERMS + 1):
        pool = monomials if count < 3 else monomials[:_POOL]
        yield from sorted(itertools.combinations(pool, count), key=lambda terms: sum(map(_cost, terms)))


def _exact(terms: Sequence[Monomial], rows: Sequence[Mapping[str, int]], lengths: Sequence[int]) -> list[Fraction]:
    """The weights for which the sum is every length; [] if there are none, or nothing was left to confirm them.

    Models in which a quotient is no whole number say nothing: the family rounds it in a way of its own.
    """
    basis: list[tuple[int, list[Fraction]]] = []
    confirmed = False
    for row, length in zip(rows, lengths, strict=True):
        line = [*(_value(term, row) for term in terms), Fraction(length)]
        if any(value.denominator != 1 for value in line):
            continue
        for pivot, known in basis:
            line = [x - line[pivot] * k for x, k in zip(line, known, strict=True)]
        pivot = next((i for i, x in enumerate(line[:-1]) if x), -1)
        if pivot >= 0:
            _add(basis, pivot, [x / line[pivot] for x in line])
        elif line[-1]:
            return []
        else:
            confirmed = True
    weights = [known[-1] for _, known in sorted(basis)]
    legal = len(basis) == len(terms) and all(w and w.denominator <= _FINEST for w in weights)
    return weights if legal and confirmed else []


def _add(basis: list[tuple[int, list[Fraction]]], pivot: int, line: list[Fraction]) -> None:
    """Keep the basis reduced, so that each of its lines ends with one weight."""
    basis[:] = [(p, [x - known[pivot] * y for x, y in zip(known, line, strict=True)]) for p, known in basis]
    basis.append((pivot, line))


def _value(term: Monomial, row: Mapping[str, int]) -> Fraction:
    total = Fraction(1)
    for name, power in term:
        total *= Fraction(row[name]) ** power
    return total


def _written(terms: Sequence[Monomial], weights: Sequence[Fraction], order: Sequence[str]) -> str:
    """Products in the configuration's order of fields, the constant last."""
    places = {name: i for i, name in enumerate(order)}
    ranked = sorted(
        zip(terms, weights, strict=True),
        key=lambda item: (not item[0], item[1] < 0, [places[name] for name, _ in item[0]]),
    )
    text = "".join(f" {'-' if weight < 0 else '+'} {_product(term, abs(weight))}" for term, weight in ranked)
    return text.removeprefix(" + ").removeprefix(" ")


def _product(term: Monomial, weight: Fraction) -> str:
    def power(name: str, exponent: int) -> str:
        return name if abs(exponent) == 1 else f"{name}^{abs(exponent)}"

    above = [power(name, exponent) for name, exponent in term if exponent > 0]
    below = [power(name, exponent) for name, exponent in term if exponent < 0]
    if weight.numerator != 1 or not above:
        above.insert(0, str(weight.numerator))
    if weight.denominator != 1:
        below.append(str(weight.denominator))
    return "/".join(["*".join(above), *below])
