"""A matrix at work: what it is given, and which axes of it are produced and contracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mupace.structure.graph import Graph, Node
from mupace.structure.operators import ADDED_PRODUCTS, CONVOLUTIONS, GROUPED, weight_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """The operands of an operator that contracts an activation with a parameter."""

    x: Any
    weight: Any
    bias: Any
    produced: int
    """Axis of the weight as it is used."""
    contracted: int | None
    """Axis of the weight as it is used; None for a convolution in groups."""
    x_axis: int
    """Axis of the activation that is contracted."""
    y_axis: int
    """Axis of the result that is produced."""


def depthwise(node: Node) -> bool:
    """Is this a convolution of each channel by itself?"""
    if node.op not in CONVOLUTIONS:
        return False
    groups = node.arg(8 if node.op == "convolution" else 6, "groups", 1)
    x, weight = node.args[:2]
    channels = (node.shape or (0, 0))[1]
    return isinstance(weight, Node) and bool(weight.shape) and groups == x.shape[1] == channels > 1


def sides_of(graph: Graph, node: Node) -> Sides | None:
    """None for an operator without a parameter, or of a form that is not known."""
    parts = weight_of(graph, node)
    if parts is None or node.op in ("bilinear", "einsum"):
        return None
    x, weight, bias = parts
    if node.op == "linear":
        return Sides(x=x, weight=weight, bias=bias, produced=-2, contracted=-1, x_axis=-1, y_axis=-1)
    if node.op in CONVOLUTIONS:
        transposed = "transpose" in node.op or (node.op == "convolution" and bool(node.args[6]))
        plain = x.shape[1] == weight.shape[0 if transposed else 1]
        produced, contracted = (1, 0) if transposed else (0, 1)
        return Sides(
            x=x,
            weight=weight,
            bias=bias,
            produced=produced,
            contracted=contracted if plain else None,
            x_axis=1,
            y_axis=1,
        )
    operands = node.args[1:3] if node.op in ADDED_PRODUCTS else node.args[:2]
    if len(weight.shape) < 2:
        return None
    if operands[0] is weight and node.op not in GROUPED:
        return Sides(x=x, weight=weight, bias=bias, produced=-2, contracted=-1, x_axis=-2, y_axis=-2)
    return Sides(x=x, weight=weight, bias=bias, produced=-1, contracted=-2, x_axis=-1, y_axis=-1)
