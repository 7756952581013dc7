"""Roles and axes by use: what the operators say about each tensor, joined with what types and names say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mupace.params import UNKNOWN, Param
from mupace.structure.attention import Attention, matrices_after, matrices_before
from mupace.structure.branches import Residual
from mupace.structure.constants import chain, ids_of
from mupace.structure.graph import Graph, Node
from mupace.structure.operators import Use, source, strength, uses, weight_of

Verdict = tuple[str, str]
"""A role, and the operator that says so."""

_PARTS = ("attention_q", "attention_k", "attention_v")


def graph_roles(
    graph: Graph, found: Iterable[Attention], sums: Iterable[Residual], logits: Node | None, matrices: int
) -> dict[str, Verdict]:
    """Role by dataflow, for the tensors of which the graph says one."""
    roles: dict[str, Verdict] = {}
    roles |= _head(graph, logits, matrices)
    roles |= _after_attention(graph, found, sums)
    roles |= _before_attention(graph, found, [residual.total for residual in sums])
    roles |= _routers(graph)
    roles |= _tables(graph)
    return roles


def _head(graph: Graph, logits: Node | None, matrices: int) -> dict[str, Verdict]:
    end = None if logits is None else chain(graph, logits, matrices)
    parts = None if end is None else weight_of(graph, end[1])
    weight = None if parts is None else source(graph, parts[1])
    return {} if weight is None else {weight.name: ("head", "last matrix before the logits")}


def _before_attention(graph: Graph, found: Iterable[Attention], totals: list[Node]) -> dict[str, Verdict]:
    """q, k, v by the argument that a matrix leads to; several arguments make it fused."""
    reached: dict[str, dict[str, str]] = {}
    for attention in found:
        for place, node in enumerate((attention.query, attention.key, attention.value)):
            for name in _leading_to(graph, attention, node, totals):
                reached.setdefault(name, {})[_PARTS[place]] = f"{attention.said} argument {place}"
    return {
        name: (next(iter(parts)) if len(parts) == 1 else "attention_qkv", _joined(parts.values()))
        for name, parts in reached.items()
    }


def _leading_to(graph: Graph, attention: Attention, node: Node, totals: list[Node]) -> set[str]:
    """The first matrices back from an argument, and the first factors of those of low rank."""
    first = matrices_before(graph, node)
    names = set(first)
    for last in first.values():
        parts = weight_of(graph, last)
        before = matrices_before(graph, parts[0], totals) if parts is not None and attention.path else {}
        names |= {name for name, factor in before.items() if factor.path.startswith(f"{attention.path}.")}
    return names


def _joined(said: Iterable[str]) -> str:
    """ "sdpa argument 0, 1" of several."""
    first, *rest = said
    return ", ".join([first, *(text.rsplit(" ", 1)[1] for text in rest)])


def _after_attention(graph: Graph, found: Iterable[Attention], sums: Iterable[Residual]) -> dict[str, Verdict]:
    totals = [residual.total for residual in sums]
    roles: dict[str, Verdict] = {}
    for attention in found:
        after = matrices_after(graph, attention.output, totals)
        if len(after) == 1:
            roles[next(iter(after))] = ("attention_o", f"first matrix after {attention.said}")
    return roles


def _routers(graph: Graph) -> dict[str, Verdict]:
    """A matrix whose product is ranked."""
    roles: dict[str, Verdict] = {}
    for node in graph.nodes:
        if node.op == "topk" and graph.live >> node.index & 1:
            roles |= dict.fromkeys(matrices_before(graph, node), ("router", "reaches topk"))
    return roles


def _tables(graph: Graph) -> dict[str, Verdict]:
    roles: dict[str, Verdict] = {}
    for node in graph.nodes:
        if node.op != "embedding" or not graph.live >> node.index & 1:
            continue
        table, ids = source(graph, node.args[0]), ids_of(node.args[1])
        if table is not None and ids is not None:
            role = "embedding" if ids == "tokens" else "position"
            roles[table.name] = (role, f"embedding of {ids}")
    return roles


def plain_role(param: Param, found: list[Use]) -> Verdict | None:
    """The role of a tensor that neither names nor attention explain: by the operator alone."""
    kinds = {use.kind for use in found}
    if kinds == {"matrix"} and len(param.shape) > 1:
        experts = "expert" in found[0].axes
        return ("ffn", "stack of matrices") if experts else ("linear", found[0].node.op)
    if len(param.shape) <= 1 and found and kinds <= {"elementwise", "norm"}:
        ops = {use.node.op for use in found}
        if ops <= {"mul", "div"}:
            return "norm", "multiplied"
        if ops <= {"add", "sub"} or all(_is_bias(use) for use in found):
            return "bias", "added"
    if len(param.shape) > 1 and found and all(_is_token(use) for use in found):
        return "embedding", f"{found[0].node.op} of a table as it is"
    return None


def _is_token(use: Use) -> bool:
    """Does a tensor go in beside or in place of the activations?"""
    return use.kind == "elementwise" and use.node.op in ("cat", "linear", "addmm", "matmul", "repeat", "layer_norm")


def _is_bias(use: Use) -> bool:
    return use.kind == "elementwise" and use.node.op in ("linear", "addmm")


def decided(param: Param, verdict: Verdict | None, fixed: bool) -> Param:
    """The row with the graph's role; what the names said stays in the evidence."""
    if verdict is None or fixed:
        return param
    role, said = verdict
    if param.role == UNKNOWN:
        return replace(param, role=role, evidence=said)
    if param.role in (role, "linear"):
        return replace(param, role=role, evidence=f"{param.evidence}; {said}")
    return replace(param, role=role, evidence=f"{said}, against {param.role} ({param.evidence})")


def with_axes(param: Param, found: list[Use]) -> Param:
    """The row with the axes that the operators give; those of the type stay where no operator speaks."""
    if not found or len(param.shape) <= 1 or any(_agree(param, use.axes) for use in found):
        return param
    best = max(found, key=strength)
    if not param.axes:
        return replace(param, axes=best.axes)
    if best.kind == "elementwise":
        return param
    said = f"axes {'×'.join(best.axes)} by {best.node.op}, against {'×'.join(param.axes)} by type"
    return replace(param, axes=best.axes, evidence=f"{param.evidence}; {said}")


def _agree(param: Param, axes: tuple[str, ...]) -> bool:
    """Does the type say the same of every dimension longer than 1?"""
    if len(param.axes) != len(axes):
        return False
    return all(a == b or n == 1 for a, b, n in zip(param.axes, axes, param.shape, strict=True))


def uses_by_name(graph: Graph) -> Mapping[str, list[Use]]:
    """Name in the trace to the operators that consume the tensor."""
    return {node.name: uses(graph, node) for node in graph.nodes if node.op == "param"}
