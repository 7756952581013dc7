"""Residual branches: the sums x + f(x) of a forward pass, and the tensors that f(x) is proportional to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mupace.structure.gains import Walk
from mupace.structure.graph import VIEWS, Graph, Node
from mupace.structure.model import Gain
from mupace.structure.operators import source
from mupace.structure.proof import proves

_PASS = VIEWS | {"dropout"}
"""Operators that a term of a sum may go through and stay the same term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """One sum x + f(x) + g(x) + ..."""

    total: Node
    stream: Node
    """x, without views and casts."""
    terms: tuple[Node, ...]
    """f(x), g(x), ..., and parameters that are added to them."""


def residuals(graph: Graph, matrices: int) -> tuple[Residual, ...]:
    """Every sum with a term x and other terms that are made from x by at least one matrix, in order of execution.

    Args:
        graph: the traced model.
        matrices: the nodes that contract with a parameter, as bits.
    """
    found = (_residual(graph, node, matrices) for node in graph.nodes if _is_top(graph, node))
    return tuple(residual for residual in found if residual is not None)


def _is_top(graph: Graph, node: Node) -> bool:
    """A sum on the way to an output that is not itself a term of a larger sum alone."""
    if node.op != "add" or not graph.live >> node.index & 1:
        return False
    users = graph.users(node)
    while len(users) == 1 and users[0].op in _PASS:
        users = graph.users(users[0])
    return not (len(users) == 1 and users[0].op == "add")


def _residual(graph: Graph, node: Node, matrices: int) -> Residual | None:
    terms = list(_terms(graph, node))
    given = graph.bits([inner for inner in graph.nodes if inner.op == "input"])
    bases = [_base(term) for term in terms]
    for base in bases:
        if base.shape is None or prod(base.shape) != prod(node.shape or ()) or not graph.ancestors[base.index] & given:
            continue  # a mask or a position bias, which every block uses
        below = graph.descendants[base.index] & ~(1 << base.index)
        made = [term for term in terms if below >> term.index & 1 and graph.ancestors[term.index] & below & matrices]
        if made:
            biases = [term for term in terms if source(graph, term) is not None]
            return Residual(total=node, stream=base, terms=(*made, *biases))
    return None


def _terms(graph: Graph, node: Node) -> Iterator[Node]:
    """The terms of a sum; a sum that nothing else uses gives its own terms."""
    for arg in node.args[:2]:
        if not isinstance(arg, Node):
            continue
        inner, alone = arg, len(graph.users(arg)) == 1
        while alone and inner.op in _PASS:
            inner = inner.args[0]
            alone = len(graph.users(inner)) == 1
        if alone and inner.op == "add" and all(isinstance(value, Node) for value in inner.args[:2]):
            yield from _terms(graph, inner)
        else:
            yield arg


def _base(node: Node) -> Node:
    """The value behind views, casts and dropout."""
    while node.op in _PASS:
        node = node.args[0]
    return node


def branches(graph: Graph, found: tuple[Residual, ...]) -> tuple[tuple[Gain, ...], ...]:
    """The gains of each residual sum, () where nothing scales all of its terms; alike branches once.

    Every branch that is returned is proven: its gains multiply f(x), and nothing else.
    """
    entries: dict[tuple[Gain, ...], list[Residual]] = {}
    order: list[tuple[Gain, ...]] = []
    for residual in found:
        gains = _gains(graph, residual)
        if not gains:
            order.append(())
        elif gains in entries:
            entries[gains].append(residual)
        else:
            entries[gains] = [residual]
            order.append(gains)
    return tuple(gains if gains and _alone(graph, gains, entries[gains]) else () for gains in order)


def _gains(graph: Graph, residual: Residual) -> tuple[Gain, ...]:
    given = graph.ancestors[residual.stream.index]
    found = Walk(graph, stop=given).together(residual.terms)
    if found is None or not proves(graph, found.gains, residual.terms, through=residual.total, given=given):
        return ()
    return found.gains


def _alone(graph: Graph, gains: tuple[Gain, ...], sums: list[Residual]) -> bool:
    """Are the gains' tensors used in these branches only?"""
    names = {name for gain in gains for name in gain.tensors}
    inside = graph.cone(*(term for residual in sums for term in residual.terms))
    users = (user for node in graph.nodes if node.op == "param" and node.name in names for user in graph.users(node))
    return all(inside >> user.index & 1 for user in users)
