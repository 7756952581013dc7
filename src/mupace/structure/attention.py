"""Attention in a traced forward pass: its three arguments, and the matrices before and after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mupace.structure.gains import Found, Walk
from mupace.structure.graph import VIEWS, Graph, Node
from mupace.structure.model import Gain
from mupace.structure.operators import source, weight_of
from mupace.structure.proof import powers

_AFTER_SOFTMAX = VIEWS | {"dropout", "mul", "masked_fill", "where", "nan_to_num"}
_PRODUCT = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """One attention: softmax(q·k) v."""

    path: str
    """Module that runs it."""
    query: Node
    key: Node
    value: Node
    scores: Node
    """q·k; the attention operator itself where that is one operator."""
    weighted: Node
    """What softmax is applied to; the attention operator itself where that is one operator."""
    output: Node
    scale: float | None
    """What the operator multiplies q·k with; None where it is not known."""
    said: str
    """"sdpa" or "softmax"."""


def attentions(graph: Graph) -> tuple[Attention, ...]:
    """Every attention on the way to an output, in order of execution."""
    found = []
    for node in graph.nodes:
        if not graph.live >> node.index & 1:
            continue
        if node.op == "scaled_dot_product_attention":
            found.append(_fused(graph, node))
        elif node.op in ("softmax", "_softmax", "_safe_softmax") and (spelled := _spelled(graph, node)) is not None:
            found.append(spelled)
    return tuple(found)


def _fused(graph: Graph, node: Node) -> Attention:
    query, key, value = node.args[:3]
    scale = node.arg(6, "scale")
    return Attention(
        path=node.path, query=query, key=key, value=value, scores=node, weighted=node, output=node, said="sdpa",
        scale=query.shape[-1] ** -0.5 if scale is None else graph.scalar(scale),
    )  # fmt: skip


def _spelled(graph: Graph, node: Node) -> Attention | None:
    """Attention written out: a product of two activations, softmax, a product with a third."""
    after = _product_after(graph, node)
    before = _product_before(graph, node.args[0])
    if after is None or before is None:
        return None
    output, value = after
    at = 1 if before.op == "baddbmm" else 0
    query, key = before.args[1] if before.op == "einsum" else before.args[at : at + 2]
    scale = graph.scalar(before.kwargs.get("alpha", 1.0)) if before.op == "baddbmm" else 1.0
    return Attention(
        path=node.path, query=query, key=key, value=value, scores=before, weighted=node.args[0], output=output,
        said="softmax", scale=scale,
    )  # fmt: skip


def _product_after(graph: Graph, node: Node) -> tuple[Node, Node] | None:
    """(the product of the probabilities with the values, the values)."""
    todo, seen = [node], {node}
    while todo:
        here = todo.pop(0)
        for user in graph.users(here):
            if user.op in ("matmul", "bmm", "einsum"):
                operands = user.args[1] if user.op == "einsum" else user.args[:2]
                return user, operands[1] if operands[0] is here else operands[0]
            if user.op in _AFTER_SOFTMAX and user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _product_before(graph: Graph, node: Node) -> Node | None:
    """The product of two activations that the scores come from, the first in the order of the terms."""
    todo, seen = [node], {node}
    while todo:
        here = todo.pop()
        if here.op in _PRODUCT:
            return here if weight_of(graph, here) is None else None
        if weight_of(graph, here) is not None:
            continue
        for value in reversed(here.inputs):
            if value not in seen:
                seen.add(value)
                todo.append(value)
    return None


def matrices_before(graph: Graph, node: Node, stop: Iterable[Node] = ()) -> dict[str, Node]:
    """The first matrices on every way back from a value that does not cross a node in `stop`: name to operator."""
    found: dict[str, Node] = {}
    todo, seen = [node], {node, *stop}
    while todo:
        here = todo.pop()
        parts = weight_of(graph, here)
        if parts is not None and (w := source(graph, parts[1])) is not None:
            found[w.name] = here
            continue
        fresh = [value for value in here.inputs if value not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return found


def matrices_after(graph: Graph, node: Node, stop: Iterable[Node]) -> dict[str, Node]:
    """The first matrices on every way forward from a value that does not cross one of the nodes in `stop`."""
    found: dict[str, Node] = {}
    todo, seen = [node], {node, *stop}
    while todo:
        here = todo.pop()
        for user in graph.users(here):
            parts = weight_of(graph, user)
            if parts is not None and (w := source(graph, parts[1])) is not None:
                found[w.name] = user
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return found


def queries(graph: Graph, found: Iterable[Attention]) -> dict[str, tuple[Gain, ...]]:
    """Per attention module what scales its q and neither k nor v, proven; () where nothing does."""
    gains: dict[str, tuple[Gain, ...]] = {}
    for attention in found:
        mine = _query(graph, attention)
        gains[attention.path] = mine if gains.get(attention.path, mine) == mine else ()
    return gains


def _query(graph: Graph, attention: Attention) -> tuple[Gain, ...]:
    projections = matrices_before(graph, attention.query)
    given = 0
    for node in projections.values():
        given |= graph.cone(*(x for x in node.inputs if source(graph, x) is None))
    walk = Walk(graph, stop=given)
    part: Found | None = walk.gains(attention.query)
    if part is None or not part.gains:
        return ()
    sides = (attention.query, attention.key, attention.value)
    power = powers(graph, part.gains, sides, given=given)
    return part.gains if [power.get(side, 0.0) for side in sides] == [1.0, 0.0, 0.0] else ()
