"""Read a model: its tensors by what the operators do with them, and where multipliers can be folded in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mupace.errors import ConfigError, MatchError, MupaceWarning
from mupace.params import AXES, UNKNOWN, Param, ParamTable, matching
from mupace.params.axes import checked_axes
from mupace.params.table import refuse_unknown, total_table
from mupace.structure.attention import attentions, queries
from mupace.structure.branches import branches, residuals
from mupace.structure.buffers import scalar_buffers
from mupace.structure.constants import constants, uncapped
from mupace.structure.gains import LINEAR_UNARY, Walk
from mupace.structure.graph import Graph, Node
from mupace.structure.inputs import inputs_for
from mupace.structure.kept import kept_trace
from mupace.structure.model import Gain, Structure
from mupace.structure.operators import Use, elementwise_axes, weight_of
from mupace.structure.proof import proves
from mupace.structure.trace import Inputs, Trace, trace
from mupace.structure.verdicts import decided, graph_roles, plain_role, uses_by_name, with_axes

_LOOKED_UP = ("embedding", "position", "norm", "bias")
"""Roles whose last dimension carries features and whose others are looked up, if no operator is seen."""


def read(
    model: torch.nn.Module,
    *,
    inputs: Inputs | None = None,
    roles: Mapping[str, str] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> Structure:
    """The structure of a model, read from its operators; the model is not changed, and nothing is computed.

    The forward pass is traced with torch.export on the meta device, once in a process for transformers models that
    are alike in all that a trace depends on. Roles follow from the operators that use a
    tensor, then from types and names; `roles` and `axes` have the last word.

    Args:
        model: a torch.nn.Module on any device, meta included.
        inputs: keyword arguments (a mapping) or arguments (a tuple) of its forward; their values do not matter.
            A transformers model needs none. Without any, only types and names are read and `traced` is False; so
            it is, with a warning, for a transformers model whose own inputs cannot be made.
        roles: selector to role.
        axes: selector to what each dimension is there for, one of `AXES` each.

    Raises:
        ConfigError: for a role or an axis that does not exist, or a forward pass that `inputs` cannot trace.
        MatchError: for a trainable tensor whose role or axes nothing gives, or a selector that names nothing.
    """
    table = total_table(model, roles, "roles")
    overridden = {row.name for selector in roles or {} for row in matching(table.rows, selector, "roles")}
    fixed = _fixed_axes(table, axes or {})
    inner, prefix = _unwrapped(model)
    try:
        traced = _traced(inner, inputs)
    except ConfigError as error:
        if inputs is not None:
            raise
        warnings.warn(f"{error}; only its types and names were read", MupaceWarning, stacklevel=2)
        traced = None
    if traced is None:
        return Structure(table=_checked(model, table, table.rows, fixed))
    canonical = {name.removeprefix(prefix): row.name for row in table for name in (row.name, *row.aliases)}
    graph = Graph(traced, scalar_buffers(inner), canonical)
    return _structure(model, graph, table, overridden, fixed)


def _traced(model: torch.nn.Module, inputs: Inputs | None) -> Trace | None:
    """The forward pass with the user's inputs or with a transformers model's own; None where there are neither."""
    if inputs is not None:
        return trace(model, inputs)
    own = inputs_for(model)
    return None if own is None else kept_trace(model, own)


def _unwrapped(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that torch.compile wraps, and the prefix that the wrapper gives to names."""
    inner = getattr(model, "_orig_mod", None)
    return (inner, "_orig_mod.") if isinstance(inner, torch.nn.Module) else (model, "")


def _structure(
    model: torch.nn.Module, graph: Graph, table: ParamTable, overridden: set[str], fixed: Mapping[str, tuple[str, ...]]
) -> Structure:
    matrices = graph.bits([node for node in graph.nodes if weight_of(graph, node) is not None])
    found, sums, logits = attentions(graph), residuals(graph, matrices), _logits(graph)
    verdicts = graph_roles(graph, found, sums, logits, matrices)
    consumed = uses_by_name(graph)
    rows = [_row(row, verdicts, consumed.get(row.name, []), row.name in overridden) for row in table.rows]
    return Structure(
        table=_checked(model, table, rows, fixed),
        branches=branches(graph, sums),
        logits=_logit_gains(graph, logits, consumed),
        queries=queries(graph, found),
        constants=constants(graph, found, logits, matrices),
        traced=True,
    )


def _row(row: Param, verdicts: Mapping[str, tuple[str, str]], found: list[Use], fixed: bool) -> Param:
    verdict = verdicts.get(row.name)
    if verdict is None and row.role == UNKNOWN:
        verdict = plain_role(row, found)
    return with_axes(decided(row, verdict, fixed), found)


def _logits(graph: Graph) -> Node | None:
    """The output that is called logits, or the only one without a name; None for a model without a read-out."""
    named = [node for name, node in graph.outputs.items() if name.partition("#")[0].endswith("logits")]
    if named:
        return named[0]
    unnamed = [node for name, node in graph.outputs.items() if name.startswith("#")]
    return unnamed[0] if unnamed else None


def _logit_gains(graph: Graph, logits: Node | None, consumed: Mapping[str, list[Use]]) -> tuple[Gain, ...]:
    """What scales the logits alone, before a soft cap; a tensor that is used elsewhere too cannot."""
    if logits is None:
        return ()
    while logits.op in LINEAR_UNARY and logits.inputs:
        logits = logits.inputs[0]
    target = uncapped(graph, logits)
    shared = [name for name, found in consumed.items() if len({use.node for use in found}) > 1]
    found = Walk(graph, shared=shared).gains(target)
    return found.gains if found is not None and proves(graph, found.gains, (target,), through=target) else ()


def _fixed_axes(table: ParamTable, axes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    fixed: dict[str, tuple[str, ...]] = {}
    for selector, given in axes.items():
        argument = f"axes[{selector!r}]"
        checked = checked_axes(argument, given)
        for row in matching(table.rows, selector, "axes"):
            if len(row.shape) != len(checked):
                raise ConfigError(f"{argument}={checked} is for {len(checked)} dimensions: {row.name} is {row.shape}")
            fixed[row.name] = checked
    return fixed


def _checked(
    model: torch.nn.Module, table: ParamTable, rows: Sequence[Param], fixed: Mapping[str, tuple[str, ...]]
) -> ParamTable:
    """The table with every axis known, or an error for the first trainable tensor that lacks role or axes."""
    finished = tuple(_finished(row, fixed) for row in rows)
    refuse_unknown(model, finished, "roles")
    lost = [row for row in finished if len(row.axes) != len(row.shape) and row.trainable]
    if lost:
        row, others = lost[0], len(lost) - 1
        also = f" (and {others} more)" if others else ""
        raise MatchError(
            f"model={type(model).__name__}: {row.name} {row.shape} has no known axes{also}: {row.evidence}; "
            f"write axes={{{row.name!r}: AXES}} with AXES one of {', '.join(AXES)} per dimension"
        )
    return ParamTable(finished, table.tensors)


def _finished(row: Param, fixed: Mapping[str, tuple[str, ...]]) -> Param:
    """The row with the axes that the user gave, or those that its role implies where nothing else spoke."""
    if row.name in fixed:
        return replace(row, axes=fixed[row.name])
    if len(row.axes) == len(row.shape) or row.role not in _LOOKED_UP:
        return row
    return replace(row, axes=elementwise_axes(row.shape))
