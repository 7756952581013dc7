"""Traces that are kept for as long as the process lives: a model like one that was read costs no second trace.

What is kept is the graph alone. It holds no tensor of the model that it was traced from, and everything that depends
on values, names and selectors is read again for every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mupace.structure.likeness import Likeness, likeness
from mupace.structure.trace import Trace, trace

LIMIT = 50_000
"""Operators that are kept in all, about 1 kB each; what was used the longest time ago goes first."""

_KEPT: dict[object, tuple[Likeness, Trace]] = {}


def kept_trace(model: torch.nn.Module, inputs: dict[str, Any]) -> Trace:
    """The trace of a transformers model: one that was made before, where nothing that it depends on differs.

    Raises:
        ConfigError: where the forward pass cannot be traced.
    """
    like = likeness(model, inputs)
    if like is None:
        return trace(model, inputs)
    known = _KEPT.pop(like.state, None)
    if known is None or not known[0].same_code(like):
        known = like, _bare(trace(model, inputs))
    _KEPT[like.state] = known
    _trim()
    return known[1]


def forget() -> None:
    """Keep nothing of what was traced so far."""
    _KEPT.clear()


def _trim() -> None:
    while sum(len(made.program.graph.nodes) for _, made in tuple(_KEPT.values())) > LIMIT and len(_KEPT) > 1:
        _KEPT.pop(next(iter(_KEPT)), None)


@dataclass(slots=True, eq=False)
class _Step:
    """One node of the graph, without what the exporter keeps about it."""

    op: str
    name: str
    target: Any
    meta: dict[str, Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    users: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class _Steps:
    nodes: tuple[_Step, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Program:
    """As much of an ExportedProgram as is read."""

    graph: _Steps
    graph_signature: Any
    constants: Mapping[str, torch.Tensor]


def _bare(made: Trace) -> Trace:
    """The same trace in a tenth of the memory."""
    program = made.program
    now: dict[Any, _Step] = {}
    for node in program.graph.nodes:
        now[node] = _Step(op=node.op, name=node.name, target=node.target, meta=_meta(node.meta))
        now[node].args, now[node].kwargs = _moved(tuple(node.args), now), _moved(dict(node.kwargs), now)
    held = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    scalars = {name: value for name, value in held.items() if value.numel() == 1}
    graph = _Steps(tuple(now.values()))
    bare = _Program(graph=graph, graph_signature=program.graph_signature, constants=scalars)
    return Trace(program=bare, outputs=made.outputs)


def _meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of the value, and the innermost module."""
    value = meta.get("val")
    shaped = torch.empty(value.shape, device="meta") if isinstance(value, torch.Tensor) else None
    stack = list((meta.get("nn_module_stack") or {}).items())
    return {"val": shaped, "nn_module_stack": dict(stack[-1:])}


def _moved(value: Any, now: Mapping[Any, _Step]) -> Any:
    """The argument with steps in place of nodes."""
    if isinstance(value, (list, tuple)):
        return tuple(_moved(item, now) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, now) for key, item in value.items()}
    return now.get(value, value) if hasattr(value, "users") else value
