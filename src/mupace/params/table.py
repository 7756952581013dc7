"""The parameter table: one row per tensor of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mupace.errors import ConfigError, MatchError, one_of
from mupace.params import show
from mupace.params.axes import AXES, axes_of
from mupace.params.blocks import Spot, spots
from mupace.params.roles import ROLES, UNKNOWN, Site, role_of
from mupace.params.select import matching, no_match

__all__ = ["AXES", "PLACES", "Param", "ParamTable", "param_table", "refuse_unknown", "total_table"]

PLACES: tuple[str, ...] = ("input", "block", "output")
"""Where a tensor stands on the way from input to output: before the blocks, in one, after them."""

_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module")
)
"""Names that torch.compile, FSDP, activation checkpointing and peft put into a path."""

_LAST_WORDS = ("final", "ln_f", "norm_f", "pool")
_FIRST_WORDS = ("embed", "patch", "stem")


@dataclass(frozen=True, kw_only=True, slots=True)
class Param:
    """One tensor of a model: its name, what it is for and where it stands."""

    name: str
    """As the model names it first; later names of the same tensor are `aliases`."""
    shape: tuple[int, ...]
    """The global shape, also under FSDP2."""
    role: str
    evidence: str
    """Why it has this role."""
    block: int | None = None
    """Index of its repeated layer, from 0."""
    stack: str | None = None
    """Name of its stack (`encoder`) in a model with several."""
    place: str = "output"
    """input, block or output."""
    aliases: tuple[str, ...] = ()
    trainable: bool = True
    axes: tuple[str, ...] = ()
    """What each dimension is there for, one of `AXES`; () where it is not known."""
    sizes: tuple[str, ...] = ()
    """How long each dimension is in terms of the configuration, "num_attention_heads*head_dim"; filled in by
    `mupace.structure.with_sizes`, () where nobody asked."""
    k_in: float = 1.0
    """How much its contracted dimension grew from the base model."""
    k_out: float = 1.0
    """How much its produced dimension grew from the base model."""
    k_depth: float = 1.0
    """How much the number of blocks grew from the base model."""

    @property
    def tied_to(self) -> str | None:
        """The first other name of the same tensor, None when it has one name."""
        return self.aliases[0] if self.aliases else None

    @property
    def numel(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True)
class ParamTable:
    """The tensors of a model, one row each, in the model's order. `print` it to read it.

    Args:
        rows: the rows.
        tensors: name to tensor, for the rows of a live model.
    """

    rows: tuple[Param, ...]
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: Any, overrides: Mapping[str, str] | None = None) -> ParamTable:
        """The table of a torch module; see `param_table`."""
        return param_table(model, overrides)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Param]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Param:
        """The row of a tensor, by its name or by an alias."""
        row = next((row for row in self.rows if name == row.name or name in row.aliases), None)
        if row is None:
            raise no_match(self.rows, name, "name")
        return row

    def __str__(self) -> str:
        return show.folded(self.rows)

    @property
    def trainable(self) -> ParamTable:
        """The trainable rows alone."""
        return self._only(row for row in self.rows if row.trainable)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, in order of appearance."""
        return tuple(dict.fromkeys(row.role for row in self.rows))

    @property
    def depths(self) -> dict[str | None, int]:
        """Number of blocks of each stack, {} for a model without blocks."""
        depths: dict[str | None, int] = {}
        for row in self.rows:
            if row.block is not None:
                depths[row.stack] = max(depths.get(row.stack, 0), row.block + 1)
        return depths

    def select(self, selector: str) -> ParamTable:
        """The rows a selector names: a role, `role:GLOB`, `re:REGEX`, a glob over names or a path.

        Raises:
            MatchError: when it names none.
        """
        return self._only(matching(self.rows, selector))

    def _only(self, rows: Iterable[Param]) -> ParamTable:
        return ParamTable(tuple(rows), self.tensors)


def param_table(model: Any, overrides: Mapping[str, str] | None = None) -> ParamTable:
    """The parameter table of a torch module: every tensor once, with its role, block and ties.

    Works on any device, meta included, and never changes the model. Roles come from module types, then from
    names, then from `overrides`, which have the last word.

    Args:
        model: a torch.nn.Module.
        overrides: selector to role; a later entry wins over an earlier one.

    Raises:
        ConfigError: for an object without parameters, or a role that does not exist.
        MatchError: for a trainable tensor that fits no role, or an override that matches nothing.

    >>> from torch import nn
    >>> print(param_table(nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10, bias=False))))
    name      role       shape    count
    0.weight  embedding  (10, 4)
    1.weight  norm       (4,)
    1.bias    bias       (4,)
    2.weight  linear     (10, 4)
    4 tensors, 88 parameters, all trainable
    """
    table = total_table(model, overrides)
    refuse_unknown(model, table.rows)
    return table


def total_table(model: Any, overrides: Mapping[str, str] | None = None, argument: str = "overrides") -> ParamTable:
    """The table of `param_table`, with rows of role `UNKNOWN` where nothing speaks for one.

    `argument` is what the caller's user calls the overrides.
    """
    names = _names_by_tensor(model)
    rows = _override(_rows(model, names), overrides or {}, argument)
    tensors = {aliases[0]: tensor for tensor, aliases in names}
    return ParamTable(tuple(rows), MappingProxyType(tensors))


Named = list[tuple[Any, list[str]]]


def _names_by_tensor(model: Any) -> Named:
    if not hasattr(model, "named_parameters"):
        raise ConfigError(f"model={type(model).__name__} has no named_parameters: give a torch.nn.Module")
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if type(tensor).__name__ == "UninitializedParameter":
            raise ConfigError(f"model: {name} has no shape yet: run one forward pass first")
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    if not found:
        raise ConfigError(f"model={type(model).__name__} has no parameters")
    return list(found.values())


def _rows(model: Any, names: Named) -> list[Param]:
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = [_owner(aliases[0]) for _, aliases in names]
    where = spots(modules, (path for path, _ in owners))
    rows = [
        _row(modules, tensor, aliases, path, attribute, where[path])
        for (tensor, aliases), (path, attribute) in zip(names, owners, strict=True)
    ]
    return _placed(rows)


def _owner(name: str) -> tuple[str, str]:
    """Path of the module that stands for the tensor, and the tensor's name in it.

    `conv.parametrizations.weight.original1` is `weight` of `conv`.
    """
    path, _, attribute = name.rpartition(".")
    head, parametrized, tail = path.rpartition("parametrizations.")
    if parametrized and "." not in tail and attribute.startswith("original"):
        return head.rstrip("."), f"{tail}_g" if attribute == "original0" else tail
    return path, attribute


def _row(modules: Mapping[str, Any], tensor: Any, names: list[str], path: str, attribute: str, spot: Spot) -> Param:
    shape = tuple(int(length) for length in tensor.shape)
    site = _site(modules, path, attribute, spot, len(shape))
    nothing = f"module {type(site.owner).__name__} and name {attribute} say nothing"
    role, evidence = role_of(site) or (UNKNOWN, nothing)
    return Param(
        name=names[0], shape=shape, role=role, evidence=evidence, block=spot.block, stack=spot.stack,
        aliases=tuple(names[1:]), trainable=bool(tensor.requires_grad), axes=axes_of(site.owner, attribute, len(shape)),
    )  # fmt: skip


def _site(modules: Mapping[str, Any], path: str, attribute: str, spot: Spot, ndim: int) -> Site:
    segments = path.split(".") if path else []
    prefixes = [".".join(segments[: i + 1]) for i in range(len(segments))]
    kept = [(i, s) for i, s in enumerate(segments) if s not in _WRAPPERS and not _saved_copy(segments, i)]
    inside = None if spot.inside is None else sum(i < spot.inside for i, _ in kept)
    parent = prefixes[kept[-1][0]].rpartition(".")[0] if kept else ""
    return Site(
        attribute=attribute,
        path=tuple(segment for _, segment in kept),
        classes=tuple(type(modules[prefixes[i]]).__name__ for i, _ in kept),
        owner=modules[path],
        siblings=tuple(name for name, _ in modules[parent].named_children()) if segments else (),
        inside=inside,
        ndim=ndim,
    )


def _saved_copy(segments: list[str], i: int) -> bool:
    """Is this segment peft's `modules_to_save.<adapter name>`, a whole copy of the module above?"""
    return segments[i] == "modules_to_save" or (i > 0 and segments[i - 1] == "modules_to_save")


def _placed(rows: list[Param]) -> list[Param]:
    """Rows with `place` set; outside the blocks the order of registration tells before from after."""
    first: dict[str | None, int] = {}
    for i, row in enumerate(rows):
        if row.block is not None:
            first.setdefault(row.stack, i)
    start = min(first.values(), default=0)
    return [replace(row, place=_place(row, i < first.get(row.stack, start))) for i, row in enumerate(rows)]


def _place(row: Param, before_blocks: bool) -> str:
    if row.block is not None:
        return "block"
    if row.role in ("embedding", "position"):
        return "input"
    if row.role == "head" or any(word in row.name for word in _LAST_WORDS):
        return "output"
    return "input" if before_blocks or any(word in row.name for word in _FIRST_WORDS) else "output"


def _override(rows: list[Param], overrides: Mapping[str, str], argument: str) -> list[Param]:
    changed = {row.name: row for row in rows}
    for selector, role in overrides.items():
        if role not in ROLES:
            raise one_of(f"{argument}[{selector!r}]", role, ROLES)
        for row in matching(rows, selector, argument):
            changed[row.name] = replace(row, role=role, evidence=f"override {selector}")
    return list(changed.values())


def refuse_unknown(model: Any, rows: Iterable[Param], argument: str = "overrides") -> None:
    """Stop at the first trainable row without a role; `argument` is where the user says one."""
    lost = [row for row in rows if row.role == UNKNOWN and row.trainable]
    if not lost:
        return
    row, others = lost[0], len(lost) - 1
    also = f" (and {others} more)" if others else ""
    raise MatchError(
        f"model={type(model).__name__}: {row.name} {row.shape} fits no role{also}: {row.evidence}; "
        f"write {argument}={{{row.name!r}: ROLE}} with ROLE one of {', '.join(ROLES)}"
    )
