"""Scalar constants of a forward pass: between the embedding and the stream, in attention, before the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isclose

from mupace.structure.attention import Attention
from mupace.structure.gains import LINEAR_UNARY
from mupace.structure.graph import VIEWS, Graph, Node
from mupace.structure.operators import source, weight_of

Chain = tuple[float, Node]
"""A product of constants, and the node that they multiply."""

_SUMS = frozenset(("add", "sub", "cat", "stack", "concat", "where", "masked_fill"))
_THROUGH = VIEWS | {"dropout", "neg", "index", "index_select", "gather", "mean", "view_as_complex", "view_as_real"}


def constants(graph: Graph, found: Iterable[Attention], logits: Node | None, matrices: int) -> dict[str, float]:
    """The constants that are known: embedding, attention, head_size, logits."""
    found = list(found)
    known = {
        "embedding": _common(_after(graph, node) for node in graph.nodes if is_token_table(graph, node)),
        "attention": _common(_attention(graph, attention, matrices) for attention in found),
        "head_size": _common(_last(attention.query) for attention in found),
        "logits": None if logits is None else _logits(graph, logits, matrices),
    }
    return {name: value for name, value in known.items() if value is not None}


def _last(node: Node) -> float | None:
    """The length of its last dimension."""
    return float(node.shape[-1]) if node.shape else None


def _common(values: Iterable[float | None]) -> float | None:
    """The value that all have, None where they differ or one is not known."""
    found = list(values)
    if not found or found[0] is None:
        return None
    return found[0] if all(value is not None and isclose(value, found[0]) for value in found) else None


def is_token_table(graph: Graph, node: Node) -> bool:
    """Is the node a look-up by the ids that were put in?"""
    return node.op == "embedding" and bool(graph.live >> node.index & 1) and ids_of(node.args[1]) == "tokens"


def ids_of(node: Node) -> str | None:
    """ "tokens" for ids that were put in, "positions" for counted ones, None where the indices do not say."""
    copies = LINEAR_UNARY - {"cumsum", "sum", "mean"} | {"masked_fill", "where", "copy", "cat", "clamp", "remainder"}
    while node.op in copies:
        sources = [arg for arg in _flat(node) if isinstance(arg, Node)]
        node = sources[-1 if node.op in ("copy", "cat", "where") else 0]
    if node.op == "input":
        return "positions" if "position" in node.name else None if "type" in node.name else "tokens"
    return "positions" if node.op in ("arange", "cumsum") or _counted(node) else None


def _flat(node: Node) -> list[object]:
    return [item for arg in node.args for item in (arg if isinstance(arg, tuple) else (arg,))]


def _counted(node: Node) -> bool:
    if node.op not in ("add", "mul", "sub", "floor_divide", "div"):
        return False
    return any(ids_of(value) == "positions" for value in node.inputs)


def _after(graph: Graph, node: Node) -> float | None:
    """The constants on the one way forward from an embedding, up to the first sum, norm or fork."""
    factor = 1.0
    while len(users := graph.users(node)) == 1:
        (user,) = users
        if user.op in ("mul", "div"):
            other = user.args[0] if user.args[1] is node else user.args[1]
            number = graph.scalar(other)
            if number is None:
                return None if isinstance(other, Node) and other.shape == () else factor
            factor = factor * number if user.op == "mul" else factor / number
        elif user.op not in LINEAR_UNARY:
            break
        node = user
    return factor


def _attention(graph: Graph, attention: Attention, matrices: int) -> float | None:
    parts = [chain(graph, side, matrices) for side in (attention.query, attention.key)]
    if attention.scale is None or None in parts:
        return None
    factor = attention.scale
    for part in parts:
        factor *= part[0] if part is not None else 1.0
    if attention.said == "sdpa":
        return factor
    after = chain(graph, attention.weighted, 1 << attention.scores.index, lambda node: node is attention.scores)
    return factor * after[0] if after is not None and after[1] is attention.scores else None


def _logits(graph: Graph, logits: Node, matrices: int) -> float | None:
    """Between the gain of the last norm, or the last matrix before the head, and the logits."""
    after = chain(graph, logits, matrices)
    parts = None if after is None else weight_of(graph, after[1])
    if after is None or parts is None:
        return None
    before = chain(graph, parts[0], matrices)
    return None if before is None else after[0] * before[0]


def chain(graph: Graph, node: Node, carriers: int, stop: Callable[[Node], bool] | None = None) -> Chain | None:
    """The constants that multiply a value on all ways back to the first operator that is no constant factor.

    Args:
        graph: the traced model.
        node: the value.
        carriers: nodes one of which a way must lead to, as bits: a rotation's cosines lead to none.
        stop: where to end besides.
    """
    factor = 1.0
    while not (stop is not None and stop(node)):
        inner = uncapped(graph, node)
        ways = [value for value in node.inputs if graph.ancestors[value.index] & carriers]
        if inner is not node or _is_shifted(graph, node):
            node = inner if inner is not node else node.args[0]
        elif node.op in _SUMS and ways:
            return _joined(graph, node, [chain(graph, way, carriers, stop) for way in ways], factor)
        elif len(ways) == 1 and _carries(graph, node):
            own = _own_factor(graph, node, ways[0])
            if own is None:
                return None
            factor, node = factor * own, ways[0]
        else:
            break
    return factor, node


def _is_shifted(graph: Graph, node: Node) -> bool:
    """x minus something made from x, its largest element: softmax does not see it."""
    if node.op != "sub" or not all(isinstance(arg, Node) for arg in node.args[:2]):
        return False
    return bool(graph.ancestors[node.args[1].index] >> node.args[0].index & 1)


def _joined(graph: Graph, node: Node, ends: list[Chain | None], factor: float) -> Chain | None:
    """Several ways must have one factor; where they do not meet at one node the sum itself is the end."""
    first = ends[0]
    if first is None or any(end is None or not isclose(end[0], first[0]) for end in ends):
        return None
    together = all(end is not None and end[1] is first[1] for end in ends)
    return factor * first[0], first[1] if together else node


def _own_factor(graph: Graph, node: Node, way: Node) -> float | None:
    """What an operator multiplies its one way with: 1 for a view, the size of cos and sin for a rotation."""
    if node.op not in ("mul", "div"):
        return 1.0
    other = node.args[1] if node.args[0] is way else node.args[0]
    number = _size(graph, other)
    return number if number is None or node.op == "mul" else 1.0 / number


def _size(graph: Graph, value: object) -> float | None:
    """A number, or the constant factor of a table; None for a number that is not known."""
    factor = 1.0
    while (number := graph.scalar(value)) is None and isinstance(value, Node):
        if value.op == "mul" and (known := _number(graph, value)) is not None:
            factor *= known
            value = next(inner for inner in value.inputs if graph.scalar(inner) is None)
        elif value.op in VIEWS:
            value = value.args[0]
        else:
            return factor if value.shape else None
    return None if number is None else factor * number


def _number(graph: Graph, node: Node) -> float | None:
    """The constant of a product or a quotient."""
    number = graph.scalar(node.args[1])
    return graph.scalar(node.args[0]) if number is None and node.op == "mul" else number


def _carries(graph: Graph, node: Node) -> bool:
    """Does a value go through the operator with no factor of its own? A rotation does, a norm's gain does not."""
    if node.op in ("mul", "div"):
        return all(source(graph, value) is None for value in node.inputs)
    return node.op in _THROUGH


def uncapped(graph: Graph, node: Node) -> Node:
    """z of cap·tanh(z/cap), the node itself where it is no soft cap."""
    if node.op != "mul" or (cap := _number(graph, node)) is None:
        return node
    inner = next((value for value in node.inputs if value.op == "tanh"), None)
    divided = inner.args[0] if inner is not None else None
    if isinstance(divided, Node) and divided.op == "div" and graph.scalar(divided.args[1]) == cap:
        value = divided.args[0]
        return value if isinstance(value, Node) else node
    return node
