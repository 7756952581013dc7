"""What changed between two architectures, and the arguments of `plan` that make the step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mupace.errors import ConfigError, MatchError
from mupace.migrate.layers import LayerMap, insertion
from mupace.migrate.match import Search, search
from mupace.migrate.matches import folded, name_of
from mupace.migrate.scopes import Side, paired_stacks, plain
from mupace.migrate.similarity import Profiler, similar_weights
from mupace.params import Param, ParamTable
from mupace.structure.fields import DEPTH, KV_HEADS, POSITIONS, WIDTH, configs, is_config, last, own_fields
from mupace.structure.trees import template

KINDS: tuple[str, ...] = (
    *("family", "width", "kv_heads", "depth", "vocabulary", "positions", "untied", "tied", "setting"),
    *("renamed", "transposed", "added", "removed", "adapters_added", "adapters_removed", "unclear"),
)
"""Every kind of change, in the order in which they are listed."""

_BOOKKEEPING = re.compile(r"transformers_version|architectures|_?name_or_path|dtype|torch_dtype|use_cache|model_type")
_VOCABULARY = ("vocab_size", "num_labels", "type_vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing in which two architectures differ."""

    kind: str
    """One of `KINDS`."""
    what: str
    """A field of the configuration, or the tensors, layers folded."""
    before: object = None
    after: object = None
    text: str
    """One line for people."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to the arguments of `plan`."""

    def __str__(self) -> str:
        return self.text


def changes(
    source: ParamTable,
    target: ParamTable,
    source_config: Any = None,
    target_config: Any = None,
    *,
    profile: Profiler | None = None,
) -> tuple[Change, ...]:
    """What changed from one architecture to another: sizes and settings, tensors renamed, added and removed.

    Args:
        source, target: tables of `mupace.structure.read`.
        source_config, target_config: configurations of `transformers`, or what their config.json says; None for plain
            modules, whose widths are then read from matched tensors.
        profile: what is known of the weights, where names do not settle who is who.

    Returns:
        The changes, those of the configuration first; none for equal architectures. One of kind "unclear" says what to
        write.

    Raises:
        ConfigError: for one configuration without the other.
    """
    if (source_config is None) != (target_config is None):
        raise ConfigError("source_config, target_config: legal are both or none")
    maps, depths = _depths(source, target, profile)
    found = search(source, target, layers=maps, profile=profile)
    fields = list(_fields(source_config, target_config)) if source_config is not None else list(_lengths(found))
    tensors = [*depths, *_ties(found), *_renamed(found), *_adapters(found), *_left(found)]
    return tuple(sorted([*fields, *tensors], key=lambda change: KINDS.index(change.kind)))


def arguments(found: Sequence[Change]) -> dict[str, Any]:
    """The keyword arguments of `plan` that make the step: target (keys of the configuration), depth_by, layers, pairs,
    rename and drop, those that are needed; and adapters="merge" where low-rank pairs go into their bases.

    Raises:
        MatchError: for an unclear change, in its own words.
    """
    made: dict[str, Any] = {}
    for change in found:
        if change.kind == "unclear":
            raise MatchError(change.text)
        for key, value in change.arguments.items():
            old = made.get(key)
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                made[key] = {**old, **value}
            elif isinstance(value, tuple) and isinstance(old, tuple):
                made[key] = (*old, *value)
            else:
                made[key] = value
    return made


# Configurations.


def _fields(source: Any, target: Any) -> Iterator[Change]:
    kinds = [str(_get(side, "model_type")) for side in (source, target)]
    if kinds[0] != kinds[1]:
        text = f"another family: {kinds[0]} -> {kinds[1]}; what it computes from the same weights may differ"
        yield Change(kind="family", what="model_type", before=kinds[0], after=kinds[1], text=text,
                     arguments={"target": {"model_type": kinds[1]}})  # fmt: skip
    ours, theirs = _flat(source), _flat(target)
    for name in dict.fromkeys((*ours, *theirs)):
        before, after = ours.get(name), theirs.get(name)
        one_sided = kinds[0] != kinds[1] and not (name in ours and name in theirs)
        if before != after and not one_sided:
            yield _field(name, before, after)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Path to value of every field that a person sets."""
    if is_config(config):
        parts = [(prefix + path, own_fields(part)) for path, part in configs(config)]
    else:
        parts = [(prefix, {k: v for k, v in config.items() if not isinstance(v, Mapping) or "model_type" not in v})]
        inner = {k: v for k, v in config.items() if isinstance(v, Mapping) and "model_type" in v}
        parts += [(f"{prefix}{k}.", _flat(v)) for k, v in inner.items()]
    labels = {"num_labels": config.num_labels} if is_config(config) and hasattr(config, "num_labels") else {}
    found = {f"{path}{k}": _plain(v) for path, own in parts for k, v in own.items() if not _BOOKKEEPING.fullmatch(k)}
    return {**{k: v for k, v in found.items() if last(k) not in ("id2label", "label2id")}, **labels}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _field(path: str, before: Any, after: Any) -> Change:
    kind, said = _kind(last(path)), f"{before} -> {after}"
    if kind in ("width", "kv_heads", "vocabulary", "positions", "depth") and _whole(before) and _whole(after):
        said += f" ({_ratio(before, after)})" if kind != "vocabulary" else f" ({after - before:+d})"
    return Change(kind=kind, what=path, before=before, after=after, text=f"{_SAID[kind]}{path} {said}",
                  arguments={"target": {path: after}})  # fmt: skip


_SAID = {
    "width": "width: ", "kv_heads": "key/value heads: ", "depth": "depth: ", "vocabulary": "vocabulary: ",
    "positions": "positions: ", "setting": "setting: ", "untied": "untied: ", "tied": "tied: ",
}  # fmt: skip


def _kind(name: str) -> str:
    for kind, names in (("kv_heads", KV_HEADS), ("width", WIDTH), ("depth", DEPTH), ("positions", POSITIONS)):
        if name in names:
            return kind
    return "vocabulary" if name in _VOCABULARY else "setting"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ratio(before: int, after: int) -> str:
    if not before:
        return "from none"
    ratio = Fraction(after, before)
    return f"x{float(ratio):g}" if Fraction(f"{float(ratio):g}") == ratio else f"x{ratio}"


def _lengths(found: Search) -> Iterator[Change]:
    """Lengths of matched tensors that differ, for models without configurations."""
    moved: dict[tuple[int, int], list[str]] = {}
    for pair in found.matches():
        if pair.origin is not None and not pair.transposed:
            ours, theirs = found.target.table[pair.target].shape, found.source.table[pair.origin].shape
            for before, after in dict.fromkeys(zip(theirs, ours, strict=True)):
                if before != after:
                    moved.setdefault((before, after), []).append(pair.target)
    for (before, after), names in moved.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"width: {before} -> {after} ({_ratio(before, after)}) in {names[0]}{more}"
        yield Change(kind="width", what=names[0], before=before, after=after, text=text)


# Tensors.


def _depths(
    source: ParamTable, target: ParamTable, profile: Profiler | None
) -> tuple[dict[str | None, LayerMap], list[Change]]:
    """A layer map for every stack whose depth differs: insertion where it grows, the kept layers where it shrinks."""
    maps: dict[str | None, LayerMap] = {}
    made: list[Change] = []
    for stack, other in paired_stacks(Side.of(target), Side.of(source)).items():
        before, after = source.depths[other], target.depths[stack]
        where = "layers" if stack is None else f"layers of {stack}"
        if after > before:
            maps[stack] = insertion(before, after)
            text = f"depth: {after - before} {where} added; insert keeps the function: {maps[stack]} (* inserted)"
            made.append(_depth(where, before, after, text, {"depth_by": "insert"}))
        elif after < before:
            maps[stack], said = _kept(source, target, stack if stack == other else None, before, after, profile)
            text = f"depth: {before - after} {where} removed; kept are, {said}: {maps[stack]}"
            made.append(_depth(where, before, after, text, {"layers": str(maps[stack])}))
    return maps, made


def _depth(where: str, before: int, after: int, text: str, given: Mapping[str, Any]) -> Change:
    return Change(kind="depth", what=where, before=before, after=after, text=text, arguments=given)


def _kept(
    source: ParamTable, target: ParamTable, stack: str | None, before: int, after: int, profile: Profiler | None
) -> tuple[LayerMap, str]:
    """The layers that stay and how that is known: by weights, or spread evenly from the first to the last."""
    if profile is not None:
        try:
            return LayerMap.of(similar_weights(source, target, profile, stack=stack)), "by their weights"
        except ConfigError:
            pass  # the target's weights are not the source's: nothing is known
    return LayerMap.of([i * (before - 1) // max(1, after - 1) for i in range(after)]), "for want of evidence"


def _ties(found: Search) -> Iterator[Change]:
    """Tensors that were one and are two, and the other way round."""
    for row in found.target.table:
        pair = found.found.get(row.name)
        origin = found.source.table[pair.source] if pair is not None and pair.source is not None else None
        if origin is not None and origin.aliases and row.role == "head" and origin.role != "head":
            text = f"untied: {row.name} has weights of its own, a copy of {origin.name} to start with"
            yield Change(kind="untied", what=row.name, before=origin.name, after=row.name, text=text,
                         arguments={"pairs": {row.name: origin.name}})  # fmt: skip
    for row in found.unclear_sources:
        tied = next((other for other in found.target.table if row.name in other.aliases), None)
        if tied is not None:
            text = f"tied: {row.name} becomes {tied.name}; its own weights are lost"
            yield Change(kind="tied", what=row.name, before=row.name, after=tied.name, text=text,
                         arguments={"drop": (row.name,)})  # fmt: skip


def _renamed(found: Search) -> Iterator[Change]:
    for group in folded(found.matches().pairs):
        first = group[0]
        if first.origin is None or found.target.table[first.target].role == "adapter":
            continue
        target, origin = (name_of([str(getattr(p, key)) for p in group]) for key in ("target", "origin"))
        tied = found.target.table[first.target].role == "head" and found.source.table[first.origin].role != "head"
        if not tied and template(plain(first.target)) != template(plain(first.origin)):
            text = f"renamed: {origin} -> {target} ({first.evidence})"
            rule = _rule([str(p.origin) for p in group], [p.target for p in group])
            yield Change(kind="renamed", what=target, before=origin, after=target, text=text, arguments=rule)
        if first.transposed:
            text = f"transposed: {target} has its axes in another order than {origin}"
            yield Change(kind="transposed", what=target, before=origin, after=target, text=text)


def _rule(sources: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """One rename rule for all numbers where both names have as many, else a pair for each."""
    old, new = sources[0].split("."), targets[0].split(".")
    count = sum(part.isdigit() for part in new)
    if sum(part.isdigit() for part in old) != count:
        return {"pairs": dict(zip(targets, sources, strict=True))}
    numbers = (f"\\{i}" for i in range(1, count + 1))
    pattern = r"\.".join(r"(\d+)" if part.isdigit() else re.escape(part) for part in old)
    return {"rename": {pattern: ".".join(next(numbers) if part.isdigit() else part for part in new)}}


def adapter_pairs(table: ParamTable) -> dict[str, tuple[str, str]]:
    """Base tensor to its low-rank pair (A, B), by peft's names: base_layer, lora_A, lora_B."""
    names = {row.name for row in table}
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*)\.lora_A\.((?:[^.]+\.)?)weight", name)
        if match is None:
            continue
        base, b = f"{match[1]}.base_layer.weight", f"{match[1]}.lora_B.{match[2]}weight"
        if base in names and b in names:
            found[base] = name, b
    return {row.name: found[row.name] for row in table if row.name in found}


def _adapters(found: Search) -> Iterator[Change]:
    added = _open_pairs(found.target, found.unclear_targets)
    for bases, rows in added:
        text = f"adapters added: a low-rank pair on {bases}, drawn anew (peft's own start leaves the function as it is)"
        new = {name: None for group in _alike(rows) for name in _selector(group, found.target.table)}
        yield Change(kind="adapters_added", what=bases, text=text, arguments={"pairs": new})
    for bases, _ in _open_pairs(found.source, found.unclear_sources):
        text = f"adapters removed: the low-rank pair on {bases} goes into its base"
        yield Change(kind="adapters_removed", what=bases, text=text, arguments={"adapters": "merge"})


def _open_pairs(side: Side, left: Sequence[Param]) -> Iterator[tuple[str, list[Param]]]:
    """Folded names of bases whose pairs have no counterpart, with the rows of A and B."""
    names = {row.name for row in left}
    pairs = {base: ab for base, ab in adapter_pairs(side.table).items() if {*ab} <= names}
    for group in _alike([side.table[base] for base in pairs]):
        yield name_of([row.name for row in group]), [side.table[n] for row in group for n in pairs[row.name]]


def _left(found: Search) -> Iterator[Change]:
    """Tensors of one side alone: added, removed; or unclear, where the other side has candidates left as well."""
    low_rank = {n for side in (found.source, found.target) for ab in adapter_pairs(side.table).values() for n in ab}
    ties = {change.what for change in _ties(found)}
    new = [row for row in found.unclear_targets if row.name not in low_rank]
    gone = [row for row in found.unclear_sources if row.name not in low_rank | ties]
    unclear = {row.role for row in new} & {row.role for row in gone}
    if unclear:
        error = found.target_error(next(row for row in new if row.role in unclear))
        yield Change(kind="unclear", what=next(row.name for row in new if row.role in unclear), text=str(error))
    for group in _alike([row for row in new if row.role not in unclear]):
        selector = _selector(group, found.target.table)
        text = f"{_what(group)} added: {name_of([r.name for r in group])} {group[0].shape}, drawn anew"
        yield Change(kind="added", what=name_of([r.name for r in group]), after=group[0].shape, text=text,
                     arguments={"pairs": dict.fromkeys(selector)})  # fmt: skip
    for group in _alike([row for row in gone if row.role not in unclear]):
        text = f"{_what(group)} removed: {name_of([r.name for r in group])} {group[0].shape}"
        yield Change(kind="removed", what=name_of([r.name for r in group]), before=group[0].shape, text=text,
                     arguments={"drop": tuple(_selector(group, found.source.table))})  # fmt: skip


def _what(group: Sequence[Param]) -> str:
    return {"ffn": "feed-forward matrix", "norm": "gain"}.get(group[0].role, group[0].role)


def _alike(rows: Sequence[Param]) -> list[list[Param]]:
    found: dict[tuple[object, ...], list[Param]] = {}
    for row in rows:
        found.setdefault((template(row.name), row.shape), []).append(row)
    return list(found.values())


def _selector(group: Sequence[Param], table: ParamTable) -> list[str]:
    """A glob that names these rows alone, else their names."""
    glob = template(group[0].name).replace("#", "*")
    names = [row.name for row in group]
    if "*" in glob and [row.name for row in table.select(glob)] == names:
        return [glob]
    return names
