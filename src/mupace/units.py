"""Lengths and positions with their units: Span, Clock, Horizon.

A length is never a bare number. `Span` is a length as people write it ("2%", "1.5B tokens"), `Clock` is a
position (what a run has consumed), `Horizon` is the planned end of a run and the map between the units:

    tokens  = steps · B_global · T_seq            B_global = micro · accumulate · workers
    steps   = N_tokens / (B_global · T_seq)       S_epoch  = ceil(D / B_global)

B_global: samples per optimizer update; T_seq: tokens per sample; D: samples in the data set; S_epoch: updates
in one pass over it. Counts are Python integers (a float32 counter loses tokens above 2^24).
"""

from __future__ import annotations

import itertools
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError, one_of

Unit: TypeAlias = Literal["step", "token", "sample", "epoch", "second", "fraction"]
Array: TypeAlias = NDArray[np.float64]
Real: TypeAlias = "float | Array"

UNITS: tuple[Unit, ...] = ("step", "token", "sample", "epoch", "second", "fraction")
_WORDS: dict[str, tuple[Unit, int]] = {
    "step": ("step", 1), "steps": ("step", 1), "update": ("step", 1), "updates": ("step", 1),
    "token": ("token", 1), "tokens": ("token", 1), "tok": ("token", 1),
    "sample": ("sample", 1), "samples": ("sample", 1),
    "epoch": ("epoch", 1), "epochs": ("epoch", 1),
    "s": ("second", 1), "sec": ("second", 1), "second": ("second", 1), "seconds": ("second", 1),
    "min": ("second", 60), "minute": ("second", 60), "minutes": ("second", 60),
    "h": ("second", 3600), "hour": ("second", 3600), "hours": ("second", 3600),
    "fraction": ("fraction", 1),
}  # fmt: skip
_POWERS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SPAN = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(e[+-]?[0-9]+)?\s*([kKMBGT]?)\s*(%|[a-zA-Z]*)\s*$")
_LONGEST = 10**18  # beyond it even an update count in float64 has no meaning
_LEGAL = 'a number with its unit, such as "2%", "500 steps", "1.5B tokens", "10k samples", "3 epochs", "90 min"'


@dataclass(frozen=True, slots=True)
class Span:
    """A length with its unit.

    Args:
        value: the length, 0 to 1e18; at most 1 for a fraction.
        unit: one of step, token, sample, epoch, second, fraction (of the horizon).

    >>> Span.parse("1.5B tokens"), str(Span.parse("2%")), str(Span.parse("2_000 steps"))
    (Span(value=1500000000, unit='token'), '2%', '2000 steps')
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise one_of("unit", self.unit, UNITS)
        value: Any = self.value
        if not is_number(value):
            raise ConfigError(f"span value {value!r} is not a number: legal is {_LEGAL}")
        if not 0 <= value <= _LONGEST:
            raise ConfigError(f"a length is 0 to {_LONGEST:.0e}, not {value!r:.40} {self.unit}s")
        if self.unit == "fraction" and value > 1:
            raise ConfigError(f"a fraction of the run is at most 100%, not {value * 100:.6g}%")
        number = plain_number(value)
        whole = self.unit != "fraction" and number == int(number)  # 3.0 steps are 3 steps: one value, one text
        object.__setattr__(self, "value", int(number) if whole else number)

    @classmethod
    def parse(cls, text: str | Span, argument: str = "span") -> Span:
        """Read a length as people write it.

        Raises:
            ConfigError: no unit, an unknown unit, not a number, or outside the range; the message names `argument`.
        """
        if isinstance(text, Span):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"{argument}={text!r} has no unit: write {_LEGAL}")
        found = _SPAN.match(text)
        if found is None:
            raise ConfigError(f"{argument}={text!r} is not a length: write {_LEGAL}")
        digits, exponent, power, word = found.groups()
        if not word:
            raise ConfigError(f"{argument}={text!r} has no unit: write {_LEGAL}")
        if word != "%" and word not in _WORDS:
            raise one_of(f"the unit in {argument}", word, _WORDS)
        try:
            number = Decimal(digits.replace("_", "") + (exponent or "")) * _POWERS[power]
            if word == "%":
                return cls(float(number) / 100, "fraction")
            unit, factor = _WORDS[word]
            return cls(_plain(number * factor), unit)
        except ArithmeticError:
            raise ConfigError(f"{argument}={text!r} is not a length: write {_LEGAL}") from None
        except ConfigError as error:
            raise ConfigError(f"{argument}={text!r}: {error}") from None

    def __str__(self) -> str:
        if self.unit == "fraction":
            percent = repr(round(self.value * 100, 10)).removesuffix(".0")
            exact = float(percent) / 100 == self.value
            return f"{percent}%" if exact else f"{self.value!r} fraction"
        for word, seconds in (("h", 3600), ("min", 60)):
            if self.unit == "second" and self.value and self.value % seconds == 0:
                return f"{self.value // seconds} {word}"
        plural = "" if self.value == 1 else "s"
        return f"{_short(self.value)} {self.unit}{plural}"


def is_number(value: Any) -> bool:
    """Whether it is a real number (numpy's too); True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain_number(value: Any) -> float:
    """The same number as a plain int or float: numpy's are neither JSON nor shown as numbers."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(number: Decimal) -> float:
    """An int where the number is whole (counts stay exact), else a float."""
    if number > _LONGEST:
        raise ConfigError(f"a length is 0 to {_LONGEST:.0e} in its unit")
    return int(number) if number == number.to_integral_value() else float(number)


def _short(value: float) -> str:
    """1500000000 -> 1.5B where that is exact and short, else the number in full."""
    whole = value >= 2**53  # there a float's short form would be another whole number
    exact = Decimal(int(value)) if whole else Decimal(repr(value))
    for suffix, power in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if exact >= power and exact / power == round(exact / power, 2):
            return f"{(exact / power).normalize():f}{suffix}"
    return str(int(value)) if whole else repr(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """A position: optimizer updates completed, tokens and samples they consumed, seconds they took.

    >>> Clock(step=1, token=64).plus(token=64)
    Clock(step=2, token=128, sample=0, second=0.0)
    """

    step: int = 0
    token: int = 0
    sample: int = 0
    second: float = 0.0

    def plus(self, *, step: int = 1, token: int = 0, sample: int = 0, second: float = 0.0) -> Clock:
        """The position after `step` more updates that consumed this much."""
        return Clock(
            step=self.step + step, token=self.token + token, sample=self.sample + sample, second=self.second + second
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, float]) -> Clock:
        names = {f.name for f in fields(cls)}
        counts = {k: int(v) for k, v in state.items() if k in names and k != "second"}
        return cls(**counts, second=float(state.get("second", 0.0)))


Ramp: TypeAlias = "tuple[tuple[Span, int], ...]"
_Table: TypeAlias = "dict[Unit, tuple[Array, Array]]"


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """Where a run ends, and how its units convert into each other.

    Args:
        total: the planned length of the run, in any unit but a fraction. Its unit is the *axis* on which a
            schedule runs (epochs are counted in steps): a run planned in tokens decays in tokens.
        tokens_per_step: tokens that one optimizer update consumes, over all ranks and micro-batches; or, while
            the batch grows, pairs (where from, tokens per step), the first from "0 tokens".
        samples_per_step: the global batch size B_global, a number or pairs in the same way.
        tokens_per_sample: the sequence length T_seq.
        samples_per_epoch: the number of samples D in the data set.
        steps_per_epoch: S_epoch where D is not known.
        seconds_per_step: a measured rate, for spans in seconds on another axis.

    Raises:
        ConfigError: numbers that contradict each other, or a conversion for which a number is missing.

    >>> h = Horizon(total="1.2B tokens", tokens_per_step=524_288)
    >>> h.steps, h.axis, h.convert("600M tokens", "step")
    (2289, 'token', 1144.4091796875)
    """

    total: Span
    tokens_per_step: int | Ramp | None = None
    samples_per_step: int | Ramp | None = None
    tokens_per_sample: int | None = None
    samples_per_epoch: int | None = None
    steps_per_epoch: int | None = None
    seconds_per_step: float | None = None
    axis: Unit = field(init=False, compare=False, repr=False, default="step")
    length: float = field(init=False, compare=False, repr=False, default=0.0)  # the total in axis units
    steps: int | None = field(init=False, compare=False, repr=False, default=None)  # rounded up; None: no rate known
    _table: _Table = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        set_("total", Span.parse(self.total, "total"))
        for name in ("tokens_per_step", "samples_per_step"):
            set_(name, _ramp(name, getattr(self, name)))
        for name in ("tokens_per_sample", "samples_per_epoch", "steps_per_epoch", "seconds_per_step"):
            set_(name, _positive(name, getattr(self, name), whole=name != "seconds_per_step"))
        self._derive(set_)
        if self.total.unit == "fraction" or self.total.value == 0:
            raise ConfigError(f"total={str(self.total)!r}: legal is a positive length such as '1.2B tokens'")
        set_("_table", self._layout())
        set_("axis", "step" if self.total.unit == "epoch" else self.total.unit)
        set_("length", float(self._axis_length()))
        set_("steps", self._count_steps())

    def _derive(self, set_: Any) -> None:
        """Fill tokens, samples and updates per epoch from each other; refuse contradictions."""
        seq, samples, tokens = self.tokens_per_sample, self.samples_per_step, self.tokens_per_step
        if seq is not None and samples is not None:
            derived = _mapped(samples, lambda size: size * seq)
            if tokens is not None and tokens != derived:
                raise ConfigError(
                    f"tokens_per_step={_shown(tokens)} contradicts samples_per_step={_shown(samples)} "
                    f"· tokens_per_sample={seq}; legal is to give two of the three"
                )
            set_("tokens_per_step", derived)
        elif seq is not None and tokens is not None:
            if any(size % seq for size in _sizes(tokens)):
                raise ConfigError(f"tokens_per_step={_shown(tokens)} is no multiple of tokens_per_sample={seq}")
            set_("samples_per_step", _mapped(tokens, lambda size: size // seq))
        self._refuse_two_ramps()
        if self.samples_per_epoch is not None and isinstance(self.samples_per_step, int):
            derived = math.ceil(self.samples_per_epoch / self.samples_per_step)
            if self.steps_per_epoch not in (None, derived):
                given = f"samples_per_epoch={self.samples_per_epoch}, samples_per_step={self.samples_per_step}"
                raise ConfigError(f"steps_per_epoch={self.steps_per_epoch} contradicts {given}: they give {derived}")
            set_("steps_per_epoch", derived)

    def _refuse_two_ramps(self) -> None:
        ramps = [r for r in (self.tokens_per_step, self.samples_per_step) if isinstance(r, tuple)]
        if len(ramps) == 2 and [at for at, _ in ramps[0]] != [at for at, _ in ramps[1]]:
            raise ConfigError(
                "tokens_per_step and samples_per_step grow at different positions; "
                "legal is to give one of them with tokens_per_sample="
            )

    def _layout(self) -> _Table:
        """Per unit, the positions of the rate changes and the rate after each; "step" holds their step numbers."""
        ramp = self.tokens_per_step if isinstance(self.tokens_per_step, tuple) else self.samples_per_step
        starts = [0] if not isinstance(ramp, tuple) else _start_steps(ramp, self._ramp_unit(), self.tokens_per_sample)
        knots: _Table = {"step": (np.array(starts, float), np.ones(len(starts)))}
        for unit, given in (("token", self.tokens_per_step), ("sample", self.samples_per_step)):
            if given is not None:
                rates = np.array([r for _, r in given] if isinstance(given, tuple) else [given] * len(starts), float)
                done = np.concatenate([[0.0], np.cumsum(np.diff(starts) * rates[:-1])])
                knots[cast(Unit, unit)] = (done, rates)
        if self.seconds_per_step is not None:
            rates = np.full(len(starts), self.seconds_per_step)
            knots["second"] = (np.array(starts) * self.seconds_per_step, rates)
        return knots

    def _ramp_unit(self) -> Unit:
        return "token" if isinstance(self.tokens_per_step, tuple) else "sample"

    def _axis_length(self) -> float:
        if self.total.unit == "epoch":
            return self.total.value * self._epoch_steps()
        return self.total.value

    def _count_steps(self) -> int | None:
        if self.axis == "second" and self.seconds_per_step is None:
            return None
        if self.axis != "step" and self.axis not in self._table:
            return None
        return math.ceil(round(float(self.to_steps(self.length, self.axis)), 9))

    def _epoch_steps(self) -> int:
        if self.steps_per_epoch is None:
            raise ConfigError(
                "a length in epochs needs steps_per_epoch, or samples_per_epoch with one samples_per_step "
                f"(given: samples_per_epoch={self.samples_per_epoch}, samples_per_step={_shown(self.samples_per_step)})"
            )
        return self.steps_per_epoch

    @property
    def growing(self) -> bool:
        """Whether the batch grows during the run."""
        return len(self._table["step"][0]) > 1

    def _rates(self, unit: Unit) -> tuple[Array, Array]:
        if unit in self._table:
            return self._table[unit]
        needs = {"token": "tokens_per_step", "sample": "samples_per_step", "second": "seconds_per_step"}
        if unit not in needs:
            raise one_of("unit", unit, UNITS)
        raise ConfigError(
            f"converting between {unit}s and steps needs {needs[unit]}=, which is not given (total={str(self.total)!r})"
        )

    def to_steps(self, x: Real, unit: Unit) -> Any:
        """The position `x`, in `unit` from the start, as a (fractional) number of updates; scalar or array."""
        if unit == "step":
            return x
        if unit == "fraction":
            return self.to_steps(np.multiply(x, self.length), self.axis)
        if unit == "epoch":
            return np.multiply(x, self._epoch_steps())
        return _interpolate(x, self._rates(unit), self._table["step"])

    def from_steps(self, steps: Real, unit: Unit) -> Any:
        """The position after `steps` updates, in `unit`; the inverse of `to_steps`."""
        if unit == "step":
            return steps
        if unit == "fraction":
            return np.divide(self.from_steps(steps, self.axis), self.length)
        if unit == "epoch":
            return np.divide(steps, self._epoch_steps())
        return _interpolate(steps, self._table["step"], self._rates(unit))

    def position(self, x: Real, unit: Unit) -> Any:
        """The position `x`, in `unit`, on the axis of this horizon."""
        if unit == self.axis:
            return x
        if unit == "fraction":
            return np.multiply(x, self.length)
        return self.from_steps(self.to_steps(x, unit), self.axis)

    def _elsewhere(self, place: Real, unit: Unit) -> Any:
        """A position on the axis, in another unit."""
        if unit == self.axis:
            return place
        if unit == "fraction":
            return np.divide(place, self.length)
        return self.from_steps(self.to_steps(place, self.axis), unit)

    def advance(self, start: float, span: Span) -> float:
        """The axis position at the end of `span` when it begins at axis position `start`."""
        if span.unit == self.axis:
            return start + span.value
        if span.unit == "fraction":
            return start + span.value * self.length
        begin = self._elsewhere(start, span.unit)
        return float(self.position(begin + span.value, span.unit))

    def retreat(self, end: float, span: Span) -> float:
        """The axis position at the begin of `span` when it ends at axis position `end`."""
        if span.unit == self.axis:
            return end - span.value
        if span.unit == "fraction":
            return end - span.value * self.length
        finish = self._elsewhere(end, span.unit)
        return float(self.position(finish - span.value, span.unit))

    def clock(self, step: int) -> Clock:
        """The planned position after `step` updates; units without a rate stay 0."""
        at = {u: float(self.from_steps(step, u)) for u in ("token", "sample", "second") if u in self._table}
        return Clock(
            step=step,
            token=round(at.get("token", 0)),
            sample=round(at.get("sample", 0)),
            second=at.get("second", 0.0),
        )

    def convert(self, span: Span | str, unit: Unit) -> float:
        """How long `span`, counted from the start of the run, is in another unit.

        >>> Horizon(total="1000 steps", samples_per_step=8, tokens_per_sample=512).convert("10%", "token")
        409600.0
        """
        if unit not in UNITS:
            raise one_of("unit", unit, UNITS)
        given = Span.parse(span)
        if given.unit == unit:
            return float(given.value)
        place = self.position(given.value, given.unit)
        return float(self._elsewhere(place, unit))

    def replace_total(self, total: Span | str) -> Horizon:
        """The same rates with another end."""
        return replace(self, total=Span.parse(total, "total"))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal horizon."""
        out: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.init):
            value = getattr(self, name)
            if isinstance(value, tuple):
                value = [[str(at), rate] for at, rate in value]
            if value is not None:
                out[name] = str(value) if isinstance(value, Span) else value
        return out

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Horizon:
        rates: dict[str, Any] = {
            k: tuple((Span.parse(a), r) for a, r in v) if isinstance(v, list) else v for k, v in state.items()
        }
        return cls(**rates)


def batch_tokens(*, micro: int, accumulate: int, workers: int, seq_len: int) -> tuple[int, int]:
    """Samples and tokens of one optimizer update: B_global = micro · accumulate · workers, and B_global · seq_len.

    >>> batch_tokens(micro=4, accumulate=8, workers=2, seq_len=1024)
    (64, 65536)
    """
    for name, value in (
        ("micro", micro),
        ("accumulate", accumulate),
        ("workers", workers),
        ("seq_len", seq_len),
    ):
        _positive(name, value)
    samples = micro * accumulate * workers
    return samples, samples * seq_len


def _positive(name: str, value: Any, whole: bool = True) -> Any:
    """The value as a plain int (or float), refused when it is not positive."""
    if value is None:
        return None
    if not is_number(value) or (whole and not isinstance(value, numbers.Integral)) or not 0 < value <= _LONGEST:
        raise ConfigError(f"{name}={value!r}: legal is a positive {'whole ' if whole else ''}number")
    return plain_number(value)


def _ramp(name: str, given: Any) -> int | Ramp | None:
    """A batch as one number, or as pairs (where from, size) with growing starts."""
    if not isinstance(given, (list, tuple)):
        return cast("int | None", _positive(name, given))
    if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair[1] is None for pair in given):
        raise ConfigError(f"{name}={given!r}: a growing batch is pairs such as ('0 tokens', 131072)")
    pairs = tuple((Span.parse(at, name), cast(int, _positive(name, size))) for at, size in given)
    for at, _ in pairs:
        if at.unit not in ("step", "token", "sample"):
            raise ConfigError(f"{name}: a batch starts at steps, tokens or samples, not at {str(at)!r}")
    if not pairs or pairs[0][0].value != 0:
        raise ConfigError(f"{name}: the first pair starts at 0, such as ('0 tokens', 131072)")
    starts = [at.value for at, _ in pairs]
    if len({at.unit for at, _ in pairs}) > 1 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ConfigError(f"{name}: the pairs start in one unit, each later than the one before")
    return pairs[0][1] if len(pairs) == 1 else pairs


def _mapped(batch: int | Ramp, change: Callable[[int], int]) -> int | Ramp:
    return change(batch) if isinstance(batch, int) else tuple((at, change(size)) for at, size in batch)


def _sizes(batch: int | Ramp) -> list[int]:
    return [batch] if isinstance(batch, int) else [size for _, size in batch]


def _shown(batch: int | Ramp | None) -> str:
    return str([(str(at), size) for at, size in batch]) if isinstance(batch, tuple) else str(batch)


def _start_steps(ramp: Ramp, unit: Unit, per_sample: int | None) -> list[int]:
    """The update at which each batch size takes over: the first one at or after the written position."""
    steps, done = [0], 0
    for (_, rate), (at, _) in itertools.pairwise(ramp):
        ahead = at.value - steps[-1] if at.unit == "step" else (_same_unit(at, unit, per_sample) - done) / rate
        n = max(math.ceil(ahead), 0)  # 0: two sizes take over within one update, and the later one counts
        steps.append(steps[-1] + n)
        done += n * rate
    return steps


def _same_unit(at: Span, unit: Unit, per_sample: int | None) -> float:
    if at.unit == unit:
        return at.value
    if per_sample is None:
        raise ConfigError(f"a batch in {unit}s that starts at {str(at)!r} needs tokens_per_sample=")
    return at.value * per_sample if unit == "token" else at.value / per_sample


def _interpolate(x: Real, source: tuple[Array, Array], target: tuple[Array, Array]) -> Any:
    """Piecewise-linear map between two units that change rate at the same knots; the last rate goes on."""
    (from_, from_rate), (to, to_rate) = source, target
    if len(from_) == 1:
        return np.multiply(x, to_rate[0]) / from_rate[0]
    k = np.clip(np.searchsorted(from_, x, side="right") - 1, 0, None)
    return to[k] + (np.asarray(x) - from_[k]) * to_rate[k] / from_rate[k]
