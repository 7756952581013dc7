"""The proof that gains scale a value: powers of the factor, carried forward through the operators.

With every gain multiplied by c > 0 each value of the forward pass is multiplied by c to some power, or by nothing
that can be said. A value with the power 1 is scaled by c, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mupace.structure.gains import LINEAR_UNARY, ZEROS
from mupace.structure.graph import Graph, Node
from mupace.structure.model import Gain
from mupace.structure.operators import MATRICES, NORMS, weight_of

_ANY = "any"
"""The power of zero."""
_NONE = "none"
"""The power of what is not proportional to the factor."""
Power = float | str


def proves(graph: Graph, gains: Sequence[Gain], targets: Sequence[Node], *, through: Node, given: int = 0) -> bool:
    """Whether the gains together scale every target by exactly their factor, and nothing else.

    Args:
        graph: the traced model.
        gains: what is multiplied.
        targets: what should be multiplied.
        through: the sum that the targets go into, or the target itself: no other use of a scaled value is allowed.
        given: nodes that are held fixed, as bits: what x is in x + f(x).
    """
    known = powers(graph, gains, targets, given=given)
    inside = graph.cone(through)
    moved = (node for node in known if node is not through and node.op != "param")
    elsewhere = any(not inside >> user.index & 1 for node in moved for user in graph.users(node))
    return all(known.get(target, 0.0) == 1.0 for target in targets) and not elsewhere


def powers(graph: Graph, gains: Sequence[Gain], targets: Iterable[Node], *, given: int = 0) -> dict[Node, Power]:
    """The power of the factor in every node between the gains and the targets; a node left out has 0."""
    reading = _Powers(graph, gains)
    below = 0
    for node in reading.start:
        below |= graph.descendants[node.index]
    for node in graph.members((below & graph.cone(*targets) & ~given) | graph.bits(reading.start)):
        reading.visit(node)
    return reading.known


class _Powers:
    def __init__(self, graph: Graph, gains: Sequence[Gain]) -> None:
        self.graph = graph
        offsets = {name: gain.offset for gain in gains for name in gain.tensors}
        names = {name for gain in gains for name in gain.tensors}
        self.start = [node for node in graph.nodes if node.op == "param" and node.name in names]
        self.offsets = {node: offsets.get(node.name, 0.0) for node in self.start}
        self.known: dict[Node, Power] = {}

    def visit(self, node: Node) -> None:
        if node in self.offsets:
            self.known[node] = _NONE if self.offsets[node] else 1.0
            return
        power = self._offset(node) or self._of(node)
        if power != 0.0:
            self.known[node] = power

    def _offset(self, node: Node) -> Power | None:
        """`1 + w` is what the factor multiplies, not w."""
        if node.op != "add":
            return None
        for value, other in (node.args[:2], node.args[1::-1]):
            base = value
            while isinstance(base, Node) and base.op in LINEAR_UNARY:
                base = base.args[0]
            if isinstance(base, Node) and (offset := self.offsets.get(base)) and self.graph.scalar(other) == offset:
                return 1.0
        return None

    def power(self, value: Any) -> Power:
        """The power of an argument."""
        if isinstance(value, Node):
            zero = value.op in ZEROS or self.graph.scalar(value) == 0
            return _ANY if zero else self.known.get(value, 0.0)
        if isinstance(value, tuple):
            return self._equal(value)
        return _ANY if isinstance(value, (int, float)) and value == 0 else 0.0

    def _of(self, node: Node) -> Power:
        args = node.args
        if all(self.power(source) == 0.0 for source in node.inputs):
            return 0.0
        if node.op in LINEAR_UNARY or node.op in ("abs", "amax", "max", "linalg_vector_norm", "norm"):
            return _NONE if any(map(self._moves, args[1:])) else self.power(args[0])
        if node.op in NORMS:
            return self._norm(node)
        if (parts := weight_of(self.graph, node)) is not None and node.op in MATRICES:
            product = self._times(*parts[:2])
            return product if parts[2] is None else _same(product, self.power(parts[2]))
        if node.op in ("add", "sub", "cat", "stack", "concat", "where", "maximum"):
            return self._equal(args[1:] if node.op == "where" else args[:2] if node.op in ("add", "sub") else args[:1])
        if node.op in ("mul", "matmul", "bmm", "mm"):
            return self._times(*args[:2])
        return self._rest(node)

    def _rest(self, node: Node) -> Power:
        args = node.args
        if node.op == "einsum":
            return self._times(*args[1])
        if node.op in ("div", "true_divide"):
            return _plus(self.power(args[0]), _times(self.power(args[1]), -1.0))
        if node.op in ("pow", "sqrt", "rsqrt", "reciprocal"):
            exponent = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(node.op) or self.graph.scalar(args[1])
            return _NONE if exponent is None else _times(self.power(args[0]), exponent)
        if node.op == "scaled_dot_product_attention":
            return self.power(args[2]) if not any(map(self._moves, (*args[:2], *args[3:]))) else _NONE
        if node.op == "masked_fill":
            return self._equal((args[0], args[2]))
        if node.op in ("index_add", "scatter_add", "index_put", "copy", "index_copy", "scatter"):
            values = [arg for arg in args[1:] if isinstance(arg, Node)]
            return self._equal((args[0], values[-1]))
        return _NONE

    def _norm(self, node: Node) -> Power:
        """A normalisation forgets the size of its input up to eps: only its gain and bias count."""
        weight, bias = (node.arg(place, key) for place, key in zip(NORMS[node.op], ("weight", "bias"), strict=True))
        if self._moves(node.args[0]):
            return _NONE
        return self.power(weight) if bias is None else self._equal((weight, bias))

    def _moves(self, value: Any) -> bool:
        return self.power(value) not in (0.0, _ANY) if value is not None else False

    def _times(self, a: Any, b: Any) -> Power:
        return _plus(self.power(a), self.power(b))

    def _equal(self, values: Iterable[Any]) -> Power:
        found: Power = _ANY
        for value in values:
            if value is not None:
                found = _same(found, self.power(value))
        return found


def _plus(a: Power, b: Power) -> Power:
    if isinstance(a, str) or isinstance(b, str):
        return _ANY if _ANY in (a, b) else _NONE
    return a + b


def _times(a: Power, factor: float) -> Power:
    return a if isinstance(a, str) else a * factor


def _same(a: Power, b: Power) -> Power:
    if a in (_ANY, b):
        return b
    return a if b == _ANY else _NONE
