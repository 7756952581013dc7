"""The words of feedback: Reading, Proposal, Verdict, Policy, and the registry of policies.

    policy.step(reading, state) -> (proposals, state)

A policy is a frozen dataclass of numbers with two pure methods. It sees readings that are already reduced over all
ranks, and it writes nothing: what becomes of a proposal is the arbiter's decision. No policy looks at a clock, draws a
random number or keeps anything but its state, which is JSON: so a run's decisions can be made again from its log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from dataclasses import field as given
from importlib import import_module
from typing import Any, Protocol, TypeAlias

from mupace.errors import ConfigError, one_of
from mupace.units import Clock

State: TypeAlias = "dict[str, Any]"
"""What a policy remembers: JSON values alone."""

KINDS = ("scale", "pace", "skip", "rollback", "stop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of an earlier proposal, judged over a long horizon on averaged weights.

    Attributes:
        policy, target: whose it was.
        step: update at which it was decided.
        direction: +1 for more learning rate (or a slower decay), -1 for less.
        applied: False for one that was held back as a control.
        effect: how much better than expected the loss came out, in standard errors; above 0 is better.
        accepted: the effect is positive and beyond what the controls show.
    """

    policy: str
    target: str
    step: int
    direction: int
    applied: bool
    effect: float
    accepted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What was measured, over all ranks, tagged with the update after which it was true.

    Attributes:
        clock: the updates, tokens, samples and seconds consumed when it was measured.
        values: name -> number; what is not known is absent, never 0; no value is NaN or infinite (see `lost`).
            Names: `loss`, `loss_ema`, `grad_norm`, `loss_scale`, `update_ratio`, `cos`, `cos_rate`, `headroom` (by
            which factor the present update could grow before the loss stops falling: η_c/η), `clip_rate`,
            `rank_spread`; the same with a role or group behind a dot (`update_ratio.ffn`); `eval.loss`,
            `eval.averaged` (on averaged weights), `eval.<metric>`; `lr`, `lr.<group>`; `lr_sum`, the sum over updates
            of schedule times feedback; `trim.<policy>.<group>`, the policy's present factor on a group.
        lost: names whose measurement was NaN or infinite, or that a rank did not have: no evidence for anything.
        counts: events since the last reading: `skipped`, `nonfinite`, `updates`.
        progress: share of the run that is done, 0 to 1.
        steps: updates of the whole run; 0 where that is not known.
        evaluated: identity of the evaluation set behind `eval.*`; None where nothing was evaluated.
        events: what happened since the last reading and makes comparison across it wrong: `resume`, `rollback`, `data`,
            `batch`, `manual`, `acted` (any applied action), `acted:<policy>`.
        verdicts: judgements that fell due.
    """

    clock: Clock
    values: Mapping[str, float] = given(default_factory=dict)
    lost: tuple[str, ...] = ()
    counts: Mapping[str, int] = given(default_factory=dict)
    progress: float = 0.0
    steps: int = 0
    evaluated: str | None = None
    events: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"reading {name}={value!r}: legal is a finite number that all ranks share")

    @property
    def step(self) -> int:
        return self.clock.step

    def get(self, name: str) -> float | None:
        """The value, None where it is not known."""
        return self.values.get(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys sorted; `from_dict` gives an equal reading."""
        out = asdict(self)
        out["clock"] = self.clock.to_dict()
        for key in ("values", "counts"):
            out[key] = dict(sorted(out[key].items()))
        return {k: v for k, v in out.items() if v not in ((), {}, None)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Reading:
        known = {**state, "clock": Clock.from_dict(state["clock"])}
        for key in ("lost", "events"):
            known[key] = tuple(known.get(key, ()))
        known["verdicts"] = tuple(Verdict(**v) for v in known.get("verdicts", ()))
        return cls(**known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What a policy would do, and why.

    Attributes:
        policy: its name.
        kind: `scale`: multiply a group's field by `factor`, relative to now; `pace`: walk the schedule at `factor`
            times the pace that lands on its end (1 is as planned; the decay rate λ of the window times factor);
            `skip`: leave out this update; `rollback`: return to the last good snapshot; `stop`: end the run.
        target: `all`, or the role or name of groups.
        factor: see `kind`; positive.
        field: the hyper-parameter, `lr` unless said otherwise.
        ramp: updates over which a `scale` is phased in, geometrically.
        reason: a code, lower case with underscores, such as `curvature_convex`.
        text: the reason in words, one line.
        evidence: the numbers it rests on.
        effect: expected change of the loss in standard errors (above 0 is better); orders conflicting proposals.
        needs: what must hold for it to be applied: `headroom`, `payback`, `snapshot`; the arbiter looks.
        judged: whether its effect is to be judged later, and its policy's confidence moved by it. Local repairs (a
            skipped update, a ratio put back into its range) are not.
    """

    policy: str
    kind: str = "scale"
    target: str = "all"
    factor: float = 1.0
    field: str = "lr"
    ramp: int = 0
    reason: str
    text: str = ""
    evidence: Mapping[str, float] = given(default_factory=dict)
    effect: float = 0.0
    needs: tuple[str, ...] = ()
    judged: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise one_of("proposal kind", self.kind, KINDS)
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"proposal factor={self.factor!r}: legal is a positive number")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is as by default is left out."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["evidence"] = dict(sorted(self.evidence.items()))
        return {k: v for k, v in out.items() if v not in ((), {}, "") and v != _DEFAULTS.get(k)}


_DEFAULTS = {"kind": "scale", "target": "all", "factor": 1.0, "field": "lr", "ramp": 0, "effect": 0.0, "judged": True}


class Policy(Protocol):
    """A pure function of readings. Implementations are frozen dataclasses, every option with a default."""

    @property
    def name(self) -> str:
        """The word in the registry, in configs and in the log."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values it looks at; a trailing `.*` stands for all roles."""

    def init(self) -> State:
        """The state before the first reading."""

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """Proposals, and the state after this reading. `state` is not changed in place.

        NaN is not possible here; a missing value is no evidence: nothing is proposed because of it, and it enters no
        average.
        """


POLICIES: dict[str, Callable[..., Policy]] = {}
"""Name to class, of those that are loaded."""

BUILT_IN = {
    "bias": "time",
    "data": "data",
    "early": "early",
    "guard": "guard",
    "layer": "layer",
    "monitor": "monitor",
    "rate": "rate",
    "time": "time",
}
"""Name to the module of this package that registers it."""


def register_policy(cls: Any) -> Any:
    """Make a policy known by its `name`; a class decorator. A second one of the same name replaces the first."""
    POLICIES[cls.name] = cls
    return cls


def policy_of(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy by name with options.

    Raises:
        ConfigError: an unknown name, an unknown option, an option out of range.
    """
    if name not in POLICIES and name in BUILT_IN:
        import_module(f"mupace.policies.{BUILT_IN[name]}")
    if name not in POLICIES:
        raise one_of("policy", name, sorted({*POLICIES, *BUILT_IN}))
    cls: Any = POLICIES[name]
    known = {f.name: f for f in fields(cls)}
    for key in options or {}:
        if key not in known:
            raise one_of(f"option of policy {name!r}", key, known)
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    try:
        made: Policy = cls(**plain)
    except TypeError as error:
        raise ConfigError(f"policy {name!r}: {error}") from None
    return made


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """{"name": …, option: value, …}, JSON-able; `policy_of(d.pop("name"), d)` gives it back."""
    options = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    return {"name": policy.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}
