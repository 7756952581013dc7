"""The multipliers of the forward pass, and where each is folded in.

residual     every residual branch x + f(x) becomes x + L^-α·f(x), when the rule set says so
logits       by the rule set for a head with a matrix of its own; 1/k for a tied head, whose matrix is the embedding's
attention    what q·k is multiplied by keeps its value at base, divided by the growth of the head size
embedding    a constant that the model multiplies its embeddings by is brought back to the base's (Gemma's √d)

A multiplier is folded into the tensors that scale the same value; where none does, it must stay explicit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mupace.errors import ConfigError
from mupace.params import ParamTable
from mupace.scaling.factors import Sized
from mupace.scaling.growth import depth_ratio
from mupace.scaling.rules import RuleSet
from mupace.structure import Gain, Structure

NAMES: tuple[str, ...] = ("residual", "logits", "attention", "embedding")


@dataclass(frozen=True, kw_only=True, slots=True)
class Multiplier:
    """One factor of the forward pass and the tensors that it can be folded into."""

    name: str
    """One of `NAMES`."""
    value: float
    gains: tuple[Gain, ...]
    """() where it cannot be folded."""
    where: str
    """For messages: the branch, the attention, the head."""


def multipliers(
    rules: RuleSet, sized: Mapping[str, Sized], base: Structure, target: Structure
) -> tuple[Multiplier, ...]:
    """Every multiplier that differs from 1.

    Raises:
        ConfigError: where one is needed and the operators of the model are not known.
    """
    if not rules.multipliers:
        return ()
    found = [*_residual(rules, sized, base.table, target), *_ends(rules, sized, base, target)]
    found += _attention(sized, base, target)
    needed = tuple(m for m in found if m.value != 1.0)
    if needed and not target.traced:
        raise ConfigError(
            f"rules need a multiplier on {needed[0].where}, and the model's operators are not known: give inputs=, "
            "what the model is called with"
        )
    return needed


def _residual(rules: RuleSet, sized: Mapping[str, Sized], base: ParamTable, target: Structure) -> Iterator[Multiplier]:
    table = target.table
    ratios = {stack: depth / base.depths[stack] for stack, depth in table.depths.items()}
    if not target.traced and any(ratio != 1.0 for ratio in ratios.values()) and rules.branch.depth:
        yield Multiplier(name="residual", value=0.0, gains=(), where="every residual branch")
    if target.traced and rules.branch.depth:
        _refuse_unseen(sized, target)
    for i, gains in enumerate(target.branches):
        rows = [table[name] for gain in gains for name in gain.tensors]
        ratio = max((depth_ratio(row, base, table) for row in rows), default=max(ratios.values(), default=1.0))
        value = ratio**rules.branch.depth
        yield Multiplier(name="residual", value=value, gains=gains, where=f"residual branch {i}")


def _refuse_unseen(sized: Mapping[str, Sized], target: Structure) -> None:
    """A stack that grew and in which no sum x + f(x) was found would get the lr of a scaled branch without its scale.

    Branches that nothing scales (no gains) may be anywhere; they are refused, or left explicit, by themselves.
    """
    grown = {one.row.stack: one.row for one in sized.values() if one.row.block is not None and one.growth.depth != 1.0}
    seen = {target.table[name].stack for gains in target.branches for gain in gains for name in gain.tensors}
    lost = [row for stack, row in grown.items() if stack not in seen]
    if lost and all(target.branches):
        raise ConfigError(
            f"residual: no sum x + f(x) is seen in the blocks of {lost[0].name}, whose number grew; legal are as "
            "many blocks in the base, or rules without a multiplier on branches, such as 'mup'"
        )


def _ends(rules: RuleSet, sized: Mapping[str, Sized], base: Structure, target: Structure) -> Iterator[Multiplier]:
    """The multipliers on the embedding and on the logits, which a tied matrix couples."""
    tied = _tied_readout(sized, target)
    change = {
        name: target.constants[name] / base.constants[name]
        for name in ("embedding", "logits")
        if name in target.constants and name in base.constants
    }
    embedding = 1.0 / change.get("embedding", 1.0)
    gains = tuple(Gain(tensors=(name,)) for name in _token_tables(sized))
    yield Multiplier(name="embedding", value=embedding, gains=gains, where="the embedding")
    heads = {name: one for name, one in sized.items() if one.row.role == "head" and "in" in one.row.axes}
    scaled = {name for gain in target.logits for name in gain.tensors}
    first = None if tied is not None else next((name for name in heads if name in scaled), next(iter(heads), None))
    if tied is not None:
        logits = 1.0 / (tied.growth.k_out * change.get("logits", 1.0) * embedding)
    else:
        logits = (1.0 if first is None else rules.logits(heads[first].growth)) / change.get("logits", 1.0)
    gains = tuple(_without_biases(sized, target.logits))
    yield Multiplier(name="logits", value=logits, gains=gains, where="the logits")
    for name, one in heads.items():  # heads beside it: each has a matrix of its own
        if name != first:
            value = rules.logits(one.growth)
            yield Multiplier(name="logits", value=value, gains=(Gain(tensors=(name,)),), where=f"what {name} gives")


def _token_tables(sized: Mapping[str, Sized]) -> tuple[str, ...]:
    """The tables that are looked up by tokens, as far as the operators say; encoder and decoder may have one each."""
    tables = [one.row for one in sized.values() if one.row.role == "embedding" and one.row.place == "input"]
    said = tuple(row.name for row in tables if "embedding of tokens" in row.evidence)
    return said or tuple(row.name for row in tables[:1])


def _without_biases(sized: Mapping[str, Sized], gains: Sequence[Gain]) -> Iterator[Gain]:
    """The gains of h·W alone: a bias of the logits themselves is as long in the base, and is not multiplied."""
    for gain in gains:
        rows = [sized[name] for name in gain.tensors]
        kept = tuple(o.row.name for o in rows if o.row.role != "bias" or o.growth.k_out != 1.0)
        if kept:
            yield Gain(tensors=kept, offset=gain.offset)


def _tied_readout(sized: Mapping[str, Sized], target: Structure) -> Sized | None:
    """The embedding matrix that is also the head's, None if the head has its own.

    A model with a tied head may have an untied one beside it (BERT's of the next sentence): the logits are those that
    the operators call so.
    """
    heads = {name for name, one in sized.items() if one.row.role == "head" and "in" in one.row.axes}
    scaled = {name for gain in target.logits for name in gain.tensors}
    if heads and (not scaled or heads & scaled):
        return None
    shared = [one for one in sized.values() if one.row.role == "embedding" and one.row.aliases]
    return next((one for one in shared if _names_a_head(one)), next(iter(shared), None))


def _names_a_head(one: Sized) -> bool:
    """Whether one of a table's names is not that of another table."""
    return any("embed" not in alias and "shared" not in alias for alias in one.row.aliases)


def _attention(sized: Mapping[str, Sized], base: Structure, target: Structure) -> Iterator[Multiplier]:
    """s_target -> s_base / k, k the growth of the head size: q·k of a grown head is a sum of k times as many terms."""
    old, new = base.constants.get("attention"), target.constants.get("attention")
    sizes = [one.constants.get("head_size", 1.0) for one in (base, target)]
    k = sizes[1] / sizes[0]
    if old is None or new is None:
        if k != 1.0:
            raise ConfigError(
                f"head size: it grew {k:g} times, and what q·k is multiplied by is not known; legal is the base's"
            )
        return
    for where, gains in target.queries.items():
        yield Multiplier(name="attention", value=old / k / new, gains=gains, where=f"the queries of {where}")


def folded(found: Sequence[Multiplier], explicit: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Name to factor, and name to offset, of every tensor that a multiplier is folded into.

    Raises:
        ConfigError: for a multiplier that nothing can take and that is not left explicit.
    """
    factors: dict[str, float] = {}
    offsets: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    for multiplier in found:
        if multiplier.name in explicit:
            continue
        if not multiplier.gains:
            raise ConfigError(
                f"{multiplier.name}: no tensor scales {multiplier.where} alone, so the multiplier "
                f"{multiplier.value:.4g} cannot be folded; write explicit=({multiplier.name!r},) for a hook instead"
            )
        for gain in multiplier.gains:
            for name in gain.tensors:
                if (name, multiplier.name) in seen:  # a tensor that blocks share takes the multiplier once
                    continue
                seen.add((name, multiplier.name))
                factors[name] = factors.get(name, 1.0) * multiplier.value
                offsets[name] = gain.offset
    return factors, offsets
