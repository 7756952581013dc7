"""The sizes of a sweep: the proxy, which is the base of a run's [parametrize] section, and multiples of it.

family     RunConfig -> Family: the target's configuration and the proxy's
at_size    the run of the same family in another size, its weights and rates scaled from the proxy
lines      numbers of widths and depths -> the sizes on these two lines
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mupace.errors import ConfigError, one_of

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig

STANDARD = "standard"
"""The run as it is written, one rate for every size: no section, no rules."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Size:
    """So many times as wide and as deep as the proxy.

    >>> [str(s) for s in (Size(), Size(width=4), Size(width=1.5, depth=2))]
    ['proxy', 'width ×4', 'width ×1.5 depth ×2']
    """

    width: float = 1.0
    depth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(f"{name}={value!r}: legal is a number above 0, a multiple of the proxy's {name}")

    def __str__(self) -> str:
        named = (("width", self.width), ("depth", self.depth))
        return " ".join(f"{name} ×{value:.4g}" for name, value in named if value != 1) or "proxy"


PROXY = Size()


def lines(widths: Iterable[float], depths: Iterable[float]) -> tuple[Size, ...]:
    """The proxy, then every width at its depth, then every depth at its width; not their products."""
    wide, deep = sorted(set(widths)), sorted(set(depths))
    return tuple(dict.fromkeys((PROXY, *(Size(width=w) for w in wide), *(Size(depth=d) for d in deep))))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A run and its proxy, as configurations of `transformers`."""

    run: RunConfig
    target: Any
    proxy: Any
    tokenizer: Any

    @property
    def target_size(self) -> Size | None:
        """The target as a multiple of the proxy; None where it is not one."""
        from mupace.structure.fields import DEPTH, HIDDEN, integers, last

        def ratio(names: frozenset[str]) -> float:
            of, to = integers(self.proxy), integers(self.target)
            found = {to[path] / of[path] for path in of if last(path) in names and of[path] and path in to}
            return found.pop() if len(found) == 1 else 1.0

        size = Size(width=ratio(HIDDEN), depth=ratio(DEPTH))
        try:
            return size if not _differing(self.grown(size), self.target) else None
        except ConfigError:
            return None

    def grown(self, size: Size) -> Any:
        """The proxy's configuration in another size.

        Raises:
            ConfigError: a multiple that leaves a size that is no whole number.
        """
        from mupace.structure.resize import resize

        return self.proxy if size == PROXY else resize(self.proxy, width=size.width, depth=size.depth)


def family(run: RunConfig) -> tuple[Family, dict[str, Any]]:
    """The family of a run, and what identifies its text.

    Without a [parametrize] section the run itself is the proxy.

    Raises:
        ConfigError, DataError: a run that cannot be made, or whose trials would not be comparable.
    """
    from mupace.trainer.parts import ingredients
    from mupace.trainer.scaling import base_of

    made = ingredients(run)
    if made.curve.horizon.steps is None:
        raise ConfigError(
            f"schedule.total={run.schedule.total!r}: the trials of a sweep are runs of equal length; legal is a total "
            "in steps, tokens, samples or epochs"
        )
    if made.blueprint.weights is not None:
        raise ConfigError(f"model.name={run.model.name!r} holds trained weights: legal is a model that starts fresh")
    target = made.blueprint.config
    base: Any = {} if run.parametrize is None else base_of(run.parametrize.base)
    proxy = _with(target, base) if isinstance(base, dict) else base
    own = Family(
        run=proxy_duration(run, made.curve.horizon.steps), target=target, proxy=proxy, tokenizer=made.data.tokenizer
    )
    return own, {"text_sha256": made.data.sha256, "tokenizer_sha256": made.data.tokenizer.sha256}


def up_to(of: Family) -> tuple[Size, ...]:
    """Every doubling of width, then of depth, from the proxy up to the target, and the target itself.

    Raises:
        ConfigError: the target is no multiple of its base.
    """
    target = of.target_size
    if target is None:
        raise ConfigError("--evidence: the target is no multiple of its base: legal is --widths or --depths")
    doublings = ([2.0**i for i in range(1, 64) if 2.0**i <= end] for end in (target.width, target.depth))
    return tuple(dict.fromkeys((*lines(*doublings), target)))


def refuse_other_length(run: RunConfig, total: str | None) -> None:
    """Refuse a length of the proxy's runs from which nothing would follow for the target's.

    Raises:
        ConfigError: another length than the one that [parametrize] derives from the target's.
    """
    from mupace.trainer.parts import ingredients

    if total is None:
        return
    made = ingredients(run)
    steps, samples = made.curve.horizon.steps, len(made.data.train)
    if steps is None:
        return  # `family` refuses such a run
    own = proxy_duration(run, steps)
    wanted, given = own.curve(samples), own.replace({"schedule.total": total}).curve(samples)
    if given.horizon.steps != wanted.horizon.steps:
        raise ConfigError(
            f"--proxy-total {total!r} is {given.horizon.steps} updates, the target's {steps} make it {wanted.steps}: a "
            "rate does not carry over to another length by itself; legal is parametrize.duration with its ratios"
        )


def at_size(of: Family, size: Size, rules: str) -> RunConfig:
    """The run in one size: the model's keys changed, scaled from the proxy by `rules`.

    At the proxy's own size, and for `standard`, there is no section: the run is trained as it stands. A [control]
    section is left out, with weights that are for it alone: what is compared are the rates of the plan, not what a
    controller makes of them.

    Raises:
        ConfigError: unknown rules, or a size that the family cannot have.
    """
    refuse_rules("rules", rules)
    wanted = of.grown(size)
    values = of.run.to_dict()
    section = values.pop("parametrize", {})
    values.pop("control", None)
    if values.get("weights", {}).get("apply") == "lr":
        del values["weights"]
    values["model"]["config"] = _keys(of, wanted)
    base = {key: value for key, value in _plain(of.proxy).items() if _plain(wanted).get(key, value) != value}
    if base and rules != STANDARD:
        values["parametrize"] = {**section, "rules": rules, "base": base}
    return type(of.run).parse(values)


def refuse_rules(argument: str, rules: str) -> None:
    """Refuse a name that is no rule set.

    Raises:
        ConfigError: with the legal names.
    """
    from mupace.scaling import RULES

    if rules not in (*RULES, STANDARD):
        raise one_of(argument, rules, dict.fromkeys([*RULES, STANDARD]))


def proxy_duration(run: RunConfig, steps: int) -> RunConfig:
    """The run with the proxy's batch and length, which are the target's unless [parametrize] has their ratios.

    Args:
        steps: of the target, its number of updates.

    Raises:
        ConfigError: a ratio of batches that leaves no whole number of samples.
    """
    section = run.parametrize
    if section is None or section.duration == "none":
        return run
    samples = run.batch.micro * run.batch.accumulate
    whole = Fraction(samples) / Fraction(section.batch).limit_denominator(1 << 16)
    if whole.denominator != 1:
        raise ConfigError(
            f"parametrize.batch={section.batch:g}: the proxy's batch would be {samples} / {section.batch:g} samples; "
            "legal is a ratio that leaves a whole number"
        )
    micro = run.batch.micro if int(whole) % run.batch.micro == 0 else int(whole)
    values = run.to_dict()
    values["batch"] = {"micro": micro, "accumulate": int(whole) // micro}
    values["schedule"]["total"] = f"{max(1, round(steps * section.batch / section.tokens))} steps"
    for key in ("batch", "tokens", "duration"):
        values["parametrize"].pop(key)
    return type(run).parse(values)


def _keys(of: Family, wanted: Any) -> dict[str, Any]:
    """The run's own keys of the model, with those changed that make it `wanted`."""
    from mupace.trainer.model import resolve

    run = of.run
    keys = dict(run.model.config)
    differing = [""]
    for _ in range(3):  # a size that follows from another one is only seen when that one has changed
        made = resolve(run.model.name, keys, tokenizer=of.tokenizer, seq_len=run.data.seq_len).config
        differing = _differing(made, wanted)
        if not differing:
            return keys
        keys |= {key: _plain(wanted)[key] for key in differing}
    left = differing[0]
    raise ConfigError(f"model: {type(wanted).__name__} does not take {left}={_plain(wanted)[left]!r}")


def _with(config: Any, changes: Mapping[str, Any]) -> Any:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        if not hasattr(changed, key):
            raise one_of("parametrize.base: key", key, sorted(_plain(changed)))
        setattr(changed, key, value)
    return changed


def _differing(one: Any, other: Any) -> list[str]:
    a, b = _plain(one), _plain(other)
    return [key for key in b if a.get(key) != b[key]]


def _plain(config: Any) -> dict[str, Any]:
    """The configuration's keys, without those that say where it comes from."""
    skipped = ("transformers_version", "architectures", "_name_or_path", "dtype")
    return {k: v for k, v in config.to_dict().items() if k not in skipped}
