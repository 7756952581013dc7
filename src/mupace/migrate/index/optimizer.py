"""The state of one optimizer, from what `optimizer.state_dict()` gave: by names, with numbers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index import evidence
from mupace.migrate.index.model import Entry, Group, OptimizerIndex
from mupace.migrate.index.naming import REMEDY, Parameter, named
from mupace.migrate.index.read import read
from mupace.migrate.index.refusals import quantised_states


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """`optimizer.state_dict()`, with what else the file says."""

    label: str
    state: Mapping[Any, Mapping[str, Any]]
    """Position, or name -> key -> tensor or number."""
    groups: Sequence[Mapping[str, Any]]
    kind: str | None = None
    names: Sequence[Sequence[str]] | None = None
    """Of the parameters, group by group."""

    @classmethod
    def of(
        cls,
        value: Mapping[str, Any],
        label: str,
        *,
        kind: str | None = None,
        names: Sequence[Sequence[str]] | None = None,
    ) -> Saved:
        """From the dict that was saved; also from the flat one, `state.NAME.KEY` and `param_groups.NAME.KEY`."""
        state, groups = (value["state"], value["param_groups"]) if "param_groups" in value else _unflattened(value)
        numbered = all(isinstance(i, int) for group in groups for i in group["params"])
        if numbered:  # torch.distributed.checkpoint makes text of the numbers
            state = {int(i) if isinstance(i, str) and i.isdigit() else i: own for i, own in state.items()}
        return cls(label=label, state=state, groups=groups, kind=kind, names=names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is known of the model when the state of an optimizer is resolved."""

    weights: Mapping[str, Entry]
    parameters: Callable[[], Sequence[Parameter] | None]
    """The parameters in the model's own order; None where nothing tells it. Called only for entries without names."""
    earlier: tuple[str, Mapping[str, Entry]] | None = None
    """Name and weights of an earlier checkpoint of the same run."""


def resolve(saved: Saved, model: Model) -> OptimizerIndex:
    """Name every entry, or refuse.

    Raises:
        CheckpointError: a position's name cannot be proven, the moments are not moments, or they are quantised.
    """
    keys = {key for state in saved.state.values() for key in state}
    quantised_states(saved.label, keys)
    ids = [list(group["params"]) for group in saved.groups]
    names, proof, weak = _names(saved, ids, model)
    flat = [(i, name) for g, own in zip(ids, names, strict=True) for i, name in zip(g, own, strict=True)]
    states = {name: _state(saved.state[i], name) for i, name in flat if i in saved.state}
    _complete(saved, flat, states)
    _shapes_agree(saved.label, states, model.weights)
    settings = [_settings(group) for group in saved.groups]
    said = evidence.moments(saved.label, states, settings, names)
    if weak:
        said += evidence.order(saved.label, states, names, model.weights, model.earlier)
    groups = tuple(Group(names=tuple(own), settings=s) for own, s in zip(names, settings, strict=True))
    kind = saved.kind or _kind(keys, settings)
    return OptimizerIndex(kind=kind, groups=groups, states=states, proof="; ".join([proof, *said]))


def _names(saved: Saved, ids: Sequence[Sequence[Any]], model: Model) -> tuple[Sequence[Sequence[str]], str, bool]:
    """(names by groups, why they are so, whether the order rests on a rule)"""
    counts = [len(own) for own in ids]
    written = saved.names or [group["param_names"] for group in saved.groups if group.get("param_names")]
    what = "the checkpoint names every entry"
    if not written and all(isinstance(i, str) for own in ids for i in own):
        written, what = ids, "the entries are saved under the names of the parameters"
    if written:
        flat = [name for own in written for name in own]
        if [len(own) for own in written] != counts or len(set(flat)) < len(flat):
            raise CheckpointError(f"{saved.label}: its names do not fit its groups of {counts} entries; {REMEDY}")
        return [list(map(str, own)) for own in written], what, False
    tensors = {i: [v for v in s.values() if isinstance(v, Entry)] for i, s in saved.state.items()}
    names, proof = named(saved.label, ids, saved.groups, tensors, model.parameters())
    return names, proof, True


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the parameters; a rate that is a tensor becomes a number."""
    plain = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return {k: read(v).item() if isinstance(v, Entry) and v.numel == 1 else v for k, v in plain.items()}


def _state(values: Mapping[str, Any], name: str) -> dict[str, Entry | float | int]:
    """One parameter's state: numbers read, tensors named."""
    dims = any(isinstance(v, Entry) and v.shape for v in values.values())
    found: dict[str, Entry | float | int] = {}
    for key, value in values.items():
        if isinstance(value, Entry):
            number = value.numel == 1 and (key == "step" or (dims and not value.shape))
            found[key] = read(value).item() if number else replace(value, name=f"{name}.{key}")
        elif isinstance(value, (int, float)):
            found[key] = value
    return found


def _complete(saved: Saved, flat: Sequence[tuple[Any, str]], states: Mapping[str, Any]) -> None:
    strangers = [i for i in saved.state if i not in {i for i, _ in flat}]
    if strangers:
        raise CheckpointError(f"{saved.label}: the state of {strangers[0]} belongs to no group; the file is damaged")
    assert len(states) == len(saved.state)


def _shapes_agree(label: str, states: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Entry]) -> None:
    """A state fits the weight of its name, where there is one of that name in the files."""
    for name, state in states.items():
        tensors = [v for v in state.values() if isinstance(v, Entry) and v.shape]
        if name in weights and tensors and not evidence.fits(tensors, weights[name].shape):
            shape = list(weights[name].shape)
            raise CheckpointError(
                f"{label}: the state of {name} has shape {list(tensors[0].shape)}, the weight has {shape}; {REMEDY}"
            )


def _kind(keys: set[str], settings: Sequence[Mapping[str, Any]]) -> str | None:
    """The class, from settings that only it has; None where they allow several."""
    options = settings[0] if settings else {}
    if "ns_steps" in options:
        return "Muon"
    if {"exp_avg", "exp_avg_sq"} <= keys and "decoupled_weight_decay" in options:
        return "AdamW" if options["decoupled_weight_decay"] else "Adam"
    if "dampening" in options and keys <= {"momentum_buffer"}:
        return "SGD"
    return None


def _unflattened(value: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """States and groups of a flat dict; parameters of equal settings are one group."""
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for path, leaf in value.items():
        kind, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        (state if kind == "state" else options).setdefault(name, {})[key] = leaf
    groups: list[dict[str, Any]] = []
    for name, own in options.items():
        alike = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == own), None)
        if alike is None:
            groups.append({**own, "params": [name]})
        else:
            alike["params"].append(name)
    return state, groups
