"""What scales a value: the walk back from it to the tensors that it is proportional to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mupace.structure.graph import VIEWS, Graph, Node
from mupace.structure.model import Gain
from mupace.structure.operators import NORMS, source, weight_of

_UNARY = {
    *("dropout", "native_dropout", "alpha_dropout", "feature_dropout"),
    *("index", "index_select", "gather", "roll", "repeat", "repeat_interleave", "flip", "tril", "triu"),
    *("neg", "sum", "mean", "cumsum", "relu", "leaky_relu"),
    *("constant_pad_nd", "pad", "im2col", "unfold", "pixel_shuffle", "pixel_unshuffle", "upsample_nearest2d"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d", "max_pool2d"),
}
"""Operators that are proportional to their first argument, which factors above 0 go through."""

LINEAR_UNARY = VIEWS | _UNARY
"""Views and the like."""

ZEROS = frozenset(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"))

_PUT = {"index_add": 3, "scatter_add": 3, "index_put": 2, "copy": 1, "index_copy": 3, "scatter": 3, "scatter_reduce": 3}
"""Operators that write values into a tensor: the place of the values."""


@dataclass(frozen=True, slots=True)
class Found:
    """Gains, and the nodes at which they come in."""

    gains: tuple[Gain, ...] = ()
    nodes: tuple[Node, ...] = ()

    def __add__(self, other: Found) -> Found:
        gains = tuple(dict.fromkeys((*self.gains, *other.gains)))
        return Found(gains, tuple(dict.fromkeys((*self.nodes, *other.nodes))))


class Walk:
    """Walks back from values to gains.

    Args:
        graph: the traced model.
        stop: nodes the walk may not enter, as bits: what counts as given.
        shared: names that must not be used as a gain (a tied table).
    """

    def __init__(self, graph: Graph, *, stop: int = 0, shared: Iterable[str] = ()) -> None:
        self.graph = graph
        self.stop = stop
        self.shared = frozenset(shared)
        self._known: dict[Node, Found | None] = {}

    def gains(self, node: Any) -> Found | None:
        """What a value is proportional to; None where that is nothing."""
        if not isinstance(node, Node) or self.stop >> node.index & 1:
            return None
        if node not in self._known:
            self._known[node] = None  # a value is not made from itself
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: Node) -> Found | None:
        if node.op in ZEROS or self.graph.scalar(node) == 0:
            return Found()
        if node.op in NORMS:
            weight, bias = NORMS[node.op]
            return self._gain(node, node.arg(weight, "weight"), node.arg(bias, "bias"))
        if (parts := weight_of(self.graph, node)) is not None:
            x, weight, bias = parts
            return self._gain(node, weight, bias) or self._beyond(x, bias)
        if node.op in LINEAR_UNARY:
            return self.gains(node.args[0])
        if node.op in ("mul", "div", "multiply", "true_divide"):
            return self._product(node)
        if node.op in ("add", "sub"):
            return self.together(node.args[:2])
        if node.op in ("cat", "stack", "concat"):
            return self.together(node.args[0])
        return self._other(node)

    def _other(self, node: Node) -> Found | None:
        if node.op in _PUT:
            return self.together((node.args[0], node.args[_PUT[node.op]]))
        if node.op in ("masked_fill", "where"):
            values = node.args[1:] if node.op == "where" else (node.args[0], node.args[2])
            return self.together(value for value in values if self.graph.scalar(value) != 0)
        if node.op == "scaled_dot_product_attention":
            return self.gains(node.args[2])
        if node.op in ("matmul", "bmm", "einsum"):
            operands = node.args[1] if node.op == "einsum" else node.args[:2]
            return self._either(operands[1], operands[0])
        return None

    def _gain(self, node: Node, weight: Any, bias: Any) -> Found | None:
        w, b = source(self.graph, weight), source(self.graph, bias)
        if w is None or w.name in self.shared or (bias is not None and b is None):
            return None
        return _with_biases(Found((Gain(tensors=(w.name,), offset=w.offset),), (node,)), [] if b is None else [b.name])

    def _beyond(self, x: Any, bias: Any) -> Found | None:
        """A matrix that cannot carry the factor: what its input is proportional to, and its bias."""
        found = self.gains(x)
        b = source(self.graph, bias)
        if found is None or b is None:
            return found if bias is None else None
        return found + Found((Gain(tensors=(b.name,)),))

    def _product(self, node: Node) -> Found | None:
        a, b = node.args[:2]
        if self.graph.scalar(b) is not None:
            return self.gains(a)
        if node.op in ("div", "true_divide"):
            return self._independent(self.gains(a), b)
        if self.graph.scalar(a) is not None:
            return self.gains(b)
        return self._gain(node, b, None) or self._gain(node, a, None) or self._either(a, b)

    def _either(self, a: Any, b: Any) -> Found | None:
        """One factor of a product, if the other does not change with it."""
        return self._independent(self.gains(a), b) or self._independent(self.gains(b), a)

    def _independent(self, found: Found | None, other: Any) -> Found | None:
        if found is None or not found.nodes or not isinstance(other, Node):
            return found
        touched = self.graph.cone(other) & self.graph.bits(found.nodes)
        return None if touched else found

    def together(self, terms: Iterable[Any]) -> Found | None:
        """Every term must be proportional to something; added parameters join what they are added to."""
        found, biases = Found(), []
        for term in terms:
            bias = source(self.graph, term)
            if bias is not None and not bias.offset:
                biases.append(bias.name)
                continue
            part = self.gains(term)
            if part is None:
                return None
            found = found + part
        return _with_biases(found, biases)


def _with_biases(found: Found, biases: list[str]) -> Found:
    """Biases belong to the one gain of what they are added to; with several, or a gain of 1 + w, they stand alone."""
    if not biases:
        return found
    if len(found.gains) == 1 and not found.gains[0].offset:
        tensors = (*found.gains[0].tensors, *biases)
        return Found((Gain(tensors=tuple(dict.fromkeys(tensors))),), found.nodes)
    return found + Found(tuple(Gain(tensors=(name,)) for name in biases))
