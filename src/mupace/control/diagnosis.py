"""From recorded readings to named symptoms: what is seen, what is likely, what to do, in order.

    diagnose(readings) -> findings, the surest first

Pure: the same readings give the same findings, in a run or afterwards from its log. Nothing is ever done by it; a
finding may carry the proposal that an arbiter could carry out. A symptom whose signals were not measured is not found,
and not excluded either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mupace.control.symptoms import SYMPTOMS, Thresholds
from mupace.policies import Proposal, Reading
from mupace.policies.guard import level_of

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A named symptom.

    Attributes:
        symptom: a key of `SYMPTOMS`.
        likely: the cause that this is most often.
        evidence: the numbers it rests on; `first` and `last` are updates.
        remedy: what to do, mildest and likeliest first.
        confidence: 0 to 1: 0.9 where the thing itself was measured, less where it is inferred, by the share of its
            signs that were seen. No source: this library's choice.
        proposal: what an arbiter could carry out, if it may.
    """

    symptom: str
    likely: str
    evidence: Mapping[str, float]
    remedy: tuple[str, ...]
    confidence: float
    proposal: Proposal | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys sorted."""
        out = asdict(self) | {"evidence": dict(sorted(self.evidence.items())), "remedy": list(self.remedy)}
        return {**out, "proposal": None if self.proposal is None else self.proposal.to_dict()}

    def __str__(self) -> str:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in sorted(self.evidence.items()))
        return f"{self.symptom} ({self.confidence:.0%}): {self.likely}. Seen: {numbers}. Try: {'; '.join(self.remedy)}."


@dataclass(frozen=True)
class Trace:
    """Readings by name, with what the rules ask of them."""

    readings: tuple[Reading, ...]
    at: Thresholds

    @cached_property
    def _series(self) -> dict[str, tuple[list[int], list[float]]]:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for reading in self.readings:
            for name, value in reading.values.items():
                steps, values = found.setdefault(name, ([], []))
                steps.append(reading.step)
                values.append(value)
        return found

    def of(self, name: str, last: int | None = None) -> tuple[Array, Array]:
        """(updates, values) where it is known; only the last so many, if given."""
        steps, values = self._series.get(name, ([], []))
        start = 0 if last is None else max(0, len(values) - last)
        return np.asarray(steps[start:], np.float64), np.asarray(values[start:], np.float64)

    def recent(self, name: str) -> Array:
        return self.of(name, self.at.recent)[1]

    def median(self, name: str) -> float | None:
        """Of the recent values; None where there are too few."""
        values = self.recent(name)
        return float(np.median(values)) if len(values) >= self.at.fewest // 2 else None

    def roles(self, name: str) -> list[str]:
        return sorted(n.removeprefix(f"{name}.") for n in self._series if n.startswith(f"{name}."))

    @cached_property
    def lost_at(self) -> int | None:
        """The update at which the loss was first lost."""
        return next((r.step for r in self.readings if "loss" in r.lost), None)

    @cached_property
    def evaluations(self) -> list[Reading]:
        """The last evaluations, all of the last one's set."""
        kept = [r for r in self.readings if "eval.loss" in r.values]
        same = [r for r in kept if r.evaluated == kept[-1].evaluated]
        return same[-self.at.evaluations :]

    @cached_property
    def exploded(self) -> bool:
        """Whether the last gradient norms are above all measure and do not come back."""
        values, middles = self.of("grad_norm")[1], self.of("grad_norm_p50")[1]
        if self.lost_at is not None and 0 < len(values) < 4 and len(middles):  # at once: by the updates in between
            return bool(values[-1] >= self.at.explode * middles[-1])
        if len(values) < (self.at.fewest if self.lost_at is None else 4):
            return False
        usual = float(np.median(values))
        return bool(values[-1] >= self.at.explode * usual and values[-3:].min() >= self.at.explode / 2 * usual)


def scores(values: Array, at: Thresholds, *, log: bool = False) -> Array:
    """Robust deviations of each value from the level of the `recent` ones before it; 0 where these are too few."""
    x = (np.log(np.maximum(values, 1e-30)) if log else values).tolist()
    out = np.zeros(len(x))
    for i in range(at.fewest, len(x)):
        middle, spread = level_of(x[max(0, i - at.recent) : i], relative=not log)
        out[i] = (x[i] - middle) / max(spread, 1e-30)
    return out


def slope(values: Array) -> tuple[float, float]:
    """(least-squares slope per reading, its t from the residuals); t 0 where there are fewer than 4."""
    n = len(values)
    if n < 4:
        return 0.0, 0.0
    z = np.arange(n) - (n - 1) / 2
    rise = float(z @ values / (z @ z))
    error = math.sqrt(float(np.sum((values - values.mean() - rise * z) ** 2)) / (n - 2) / float(z @ z))
    return rise, rise / max(error, 1e-12 * abs(rise), 1e-300)


def alternation(values: Array) -> float:
    """Lag-1 autocorrelation of what a line leaves; −1 for +, −, +, −; near 0 for noise.

    Not that of differences: differences of plain noise have −0.5.
    """
    n = len(values)
    z = np.arange(n) - (n - 1) / 2
    rest = values - values.mean() - slope(values)[0] * z
    total = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / total if total > 0 else 0.0


Seen: TypeAlias = "tuple[dict[str, float], float] | None"
"""(evidence, confidence) of a symptom, None where it is not seen."""


def _nonfinite_loss(t: Trace) -> Seen:
    if t.lost_at is None or t.exploded:
        return None
    norms = t.of("grad_norm")[1]
    return {"first": float(t.lost_at), **({"grad_norm": float(norms[-1])} if len(norms) else {})}, 0.9


def _exploding_gradients(t: Trace) -> Seen:
    if not t.exploded:
        return None
    steps, values = t.of("grad_norm")
    usual = float(np.median(values))
    first = float(steps[np.argmax(values >= t.at.explode / 2 * usual)])
    lost = {} if t.lost_at is None else {"lost": float(t.lost_at)}
    return {"first": first, "last": float(steps[-1]), "grad_norm": float(values[-1]), "median": usual, **lost}, 0.9


def _loss_scale_collapse(t: Trace) -> Seen:
    steps, values = t.of("loss_scale", t.at.recent)
    if len(values) < 2 or values.min() <= 0:
        return None
    top = int(np.argmax(values))
    halvings = math.log2(values[top] / values[-1])
    falling = bool(np.all(np.diff(values[top:]) <= 0))
    if halvings < t.at.halvings or not falling:
        return None
    return {"first": float(steps[top]), "last": float(steps[-1]), "halvings": halvings, "scale": float(values[-1])}, 0.9


def _local_outlier(t: Trace) -> Seen:
    series = {role: t.of(f"grad_norm.{role}") for role in t.roles("grad_norm")}
    rows = {
        r: dict(zip(s, scores(v, t.at, log=True), strict=True)) for r, (s, v) in series.items() if len(v) >= t.at.fewest
    }
    best: tuple[float, str, float] | None = None
    for role, row in rows.items():
        for step, z in row.items():
            others = [abs(other[step]) for name, other in rows.items() if name != role and step in other]
            if z > t.at.spike and others and max(others) < t.at.calm and (best is None or z > best[0]):
                best = (float(z), role, float(step))
    return None if best is None else ({f"deviations.{best[1]}": best[0], "first": best[2], "roles": len(rows)}, 0.8)


def _second_moment_spike(t: Trace) -> Seen:
    if t.exploded:
        return None
    loss, norm, ratio = (t.of(name) for name in ("loss", "grad_norm", "update_ratio"))
    if min(len(v) for _, v in (loss, norm, ratio)) < t.at.fewest:
        return None
    usual = float(np.median(ratio[1]))
    losses = dict(zip(loss[0], scores(loss[1], t.at), strict=True))
    norms = dict(zip(norm[0], scores(norm[1], t.at, log=True), strict=True))
    for step, value in zip(*ratio, strict=True):
        both = min(losses.get(step, 0.0), norms.get(step, 0.0)) > t.at.spike
        if both and value >= t.at.jump * usual:
            deviations = {"deviations.loss": float(losses[step]), "deviations.grad_norm": float(norms[step])}
            return {"first": float(step), "update_ratio": float(value), "median": usual, **deviations}, 0.7
    return None


def _oscillation(t: Trace) -> Seen:
    losses, cosine, headroom = t.recent("loss"), t.median("cos"), t.median("headroom")
    if len(losses) < t.at.fewest:
        return None
    rho = alternation(losses)
    signs = [rho <= min(t.at.alternating, -2 / math.sqrt(len(losses)))]
    evidence = {"autocorrelation": rho}
    if cosine is not None:
        signs.append(cosine <= t.at.opposed)
        evidence["cos"] = cosine
    if headroom is not None:
        signs.append(headroom <= t.at.edge)
        evidence["headroom"] = headroom
    plain = signs[0] and rho <= 2 * t.at.alternating and len(losses) >= t.at.recent
    if sum(signs) < 2 and not plain:
        return None
    return evidence, 0.9 * sum(signs) / 3 if sum(signs) > 1 else 0.5


def _settled_rate(t: Trace, share: float = 0.5) -> bool:
    """Whether the rate is not that of a warm-up or the end of a decay; True where rates are not known."""
    values, recent = t.of("lr")[1], t.recent("lr")
    return not len(values) or bool(np.median(recent) >= share * values.max())


def _lr_too_small(t: Trace) -> Seen:
    losses = t.recent("loss")
    if len(losses) < t.at.fewest or not _settled_rate(t):
        return None
    fall = slope(losses)[1]
    known = {name: t.median(name) for name in ("cos", "headroom", "update_ratio")}
    cosine, headroom, ratio = known.values()
    signs = [
        cosine is not None and cosine >= t.at.aligned,
        headroom is not None and headroom >= t.at.far,
        ratio is not None and ratio < t.at.small_ratio,
    ]
    if fall > -t.at.sure or sum(signs) < 2:
        return None
    return {"slope_t": fall, **{k: v for k, v in known.items() if v is not None}}, 0.8 * sum(signs) / 3


def _noise_dominated(t: Trace) -> Seen:
    losses, cosines = t.recent("loss"), t.recent("cos")
    if min(len(losses), len(cosines)) < t.at.fewest or not _settled_rate(t) or _needs_annealing(t):
        return None
    trend, cosine = slope(losses)[1], float(np.median(cosines))
    if abs(trend) > t.at.flat or abs(cosine) > t.at.unrelated or alternation(losses) < t.at.alternating:
        return None
    if losses.std() < t.at.noisy * abs(losses.mean()):  # converged, without any noise
        return None
    evidence = {"slope_t": trend, "cos": cosine}
    scale, batch = t.median("noise_scale"), _batch(t)
    if scale is None or batch is None:
        return evidence, 0.4
    return ({**evidence, "noise_scale": scale, "batch": batch}, 0.8) if scale >= t.at.noise_ratio * batch else None


def _batch(t: Trace) -> float | None:
    """Samples per update, from the clock."""
    first, last = t.readings[0].clock, t.readings[-1].clock
    updates, samples = last.step - first.step, last.sample - first.sample
    return samples / updates if updates > 0 and samples > 0 else None


def _warmup_spike(t: Trace) -> Seen:
    rates, ratio = dict(zip(*t.of("lr"), strict=True)), t.of("update_ratio")
    peak = max(rates.values(), default=0.0)
    end = next((s for s, v in rates.items() if v >= 0.99 * peak), 0.0)
    inside = [(s, v) for s, v in zip(*ratio, strict=True) if s < end]
    values = np.asarray([v for _, v in inside], np.float64)
    for i, (step, value) in enumerate(inside):
        near = np.delete(values[max(0, i - 4) : i + 5], min(i, 4))
        if len(near) >= 3 and value >= t.at.jump * np.median(near) and value >= t.at.warm_ratio:
            return {"first": float(step), "update_ratio": float(value), "median": float(np.median(near))}, 0.7
    return None


def _overfitting(t: Trace) -> Seen:
    seen = t.evaluations
    if len(seen) < 5:
        return None
    values = np.asarray([r.values["eval.loss"] for r in seen], np.float64)
    steps, losses = t.of("loss")
    train = slope(losses[steps >= seen[0].step])[0]
    rise, best = slope(values)[1], float(values.min())
    if rise < t.at.sure or values[-1] - best < t.at.worse * abs(best) or train >= 0:
        return None
    at = float(seen[int(np.argmin(values))].step)
    return {"first": at, "best": best, "value": float(values[-1]), "slope_t": rise, "train_slope": train}, 0.8


def _needs_annealing(t: Trace) -> Seen:
    seen = [r for r in t.evaluations if "eval.averaged" in r.values]
    if len(seen) < 5:
        return None
    raw = np.asarray([r.values["eval.loss"] for r in seen], np.float64)
    gaps = raw - np.asarray([r.values["eval.averaged"] for r in seen], np.float64)
    steps, rates = t.of("lr")
    during = rates[steps >= seen[0].step]
    steady = not len(during) or during.max() <= 1.01 * during.min()
    gap, error = float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    trend = slope(raw)[1]
    if not steady or abs(trend) > t.at.flat or gap < max(t.at.gap, t.at.sure * error):
        return None
    return {"first": float(seen[0].step), "gap": gap, "slope_t": trend}, 0.8


def _clip_rate(t: Trace) -> Seen:
    values = t.recent("clip_rate")
    if len(values) < t.at.fewest // 2 or np.mean(values > t.at.clipped) < 0.8:
        return None
    return {"clip_rate": float(np.median(values)), "readings": float(len(values))}, 0.9


def _rank_spread(t: Trace) -> Seen:
    steps, values = t.of("rank_spread", 3)
    if len(values) < 3 or values.min() < t.at.spread:
        return None
    return {"first": float(steps[0]), "rank_spread": float(np.median(values))}, 0.8


def _embedding_undertrained(t: Trace) -> Seen:
    others = [r for r in t.roles("update_ratio") if r.startswith(("attention", "ffn", "linear", "conv"))]
    medians = [m for m in (t.median(f"update_ratio.{role}") for role in others) if m is not None]
    own = t.median("update_ratio.embedding")
    if own is None or not medians or own >= t.at.behind * float(np.median(medians)):
        return None
    return {"update_ratio.embedding": own, "update_ratio.others": float(np.median(medians))}, 0.6


RULES: dict[str, Callable[[Trace], Seen]] = {
    "nonfinite_loss": _nonfinite_loss,
    "exploding_gradients": _exploding_gradients,
    "loss_scale_collapse": _loss_scale_collapse,
    "local_outlier": _local_outlier,
    "second_moment_spike": _second_moment_spike,
    "oscillation": _oscillation,
    "lr_too_small": _lr_too_small,
    "noise_dominated": _noise_dominated,
    "warmup_spike": _warmup_spike,
    "overfitting": _overfitting,
    "needs_annealing": _needs_annealing,
    "clip_rate": _clip_rate,
    "rank_spread": _rank_spread,
    "embedding_undertrained": _embedding_undertrained,
}


def diagnose(readings: Sequence[Reading], *, thresholds: Thresholds | None = None) -> list[Finding]:
    """The symptoms that readings show, the surest first.

    Args:
        readings: in order of their updates, from a run or from its log.
        thresholds: the numbers of the rules.

    >>> diagnose([])
    []
    """
    if not readings:
        return []
    trace = Trace(tuple(readings), thresholds or Thresholds())
    seen = {name: rule(trace) for name, rule in RULES.items()}
    found = [_finding(name, *what) for name, what in seen.items() if what is not None]
    return sorted(found, key=lambda f: (-f.confidence, f.symptom))


def _finding(name: str, evidence: dict[str, float], confidence: float) -> Finding:
    known = SYMPTOMS[name]
    more = {"judged": False, **known.proposal}
    proposal = Proposal(policy="diagnosis", reason=name, text=known.likely, evidence=evidence, **more)
    return Finding(
        symptom=name,
        likely=known.likely,
        evidence=evidence,
        remedy=known.remedy,
        confidence=confidence,
        proposal=proposal if known.proposal else None,
    )
