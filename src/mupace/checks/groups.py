"""Items about parameter groups: peaks and floors, weight decay and coverage, the stage's bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mupace.checks.numbers import percent, rate, some
from mupace.checks.rates import Rates
from mupace.checks.report import Finding, bad, na, ok
from mupace.checks.subject import Subject
from mupace.errors import MatchError
from mupace.schedules import PRESETS

NEAR = 1e-6  # relative: a float32 tensor learning rate is this close to what was written into it
UNDECAYED = ("norm", "bias")


def peaks(s: Subject) -> Finding:
    """Every group reaches its peak, comes down to its floor, and wastes neither its first nor its last update."""
    if isinstance(s.rates, str):
        return na(s.rates)
    evidence = _table(s.rates)
    wrong = [*_unreached(s, s.rates), *_wasted(s, s.rates), *_changed(s)]
    if not wrong:
        return ok(evidence)
    what, remedy = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return bad(f"{evidence}: {what}{more}", remedy)


def _table(rates: Rates) -> str:
    """Per group first, highest and last rate, and its ratio to the largest."""
    largest = float(rates.highest.max())
    rows = [
        f"{name} {rate(first)}/{rate(top)}/{rate(last)}" + ("" if top in (largest, 0) else f" (×{top / largest:.3g})")
        for name, first, top, last in zip(rates.names, rates.values[0], rates.highest, rates.values[-1], strict=True)
    ]
    return f"first/highest/last: {some(rows)}"


Wrong = tuple[str, str]  # what is wrong, what to do


def rising(rates: Rates, group: int | None = None) -> bool:
    """Whether a group (the largest one) has its highest rate at the last update: its warmup never ends."""
    series = rates.values[:, int(np.argmax(rates.highest)) if group is None else group]
    return 0 < int(np.argmax(series)) == len(series) - 1


def _gated(s: Subject) -> frozenset[int]:
    """Groups that begin later than the run: they start at 0 on purpose, and may miss the peak."""
    specs = () if s.pacer is None else s.pacer.groups
    return frozenset(i for i, spec in enumerate(specs) if spec.unfreeze is not None or spec.rewarm is not None)


def _unreached(s: Subject, rates: Rates) -> Iterator[Wrong]:
    gated = _gated(s)
    for i, name in enumerate(rates.names):
        top = float(rates.highest[i])
        if top == 0:
            yield f"{name} has a rate of 0 throughout", f"set an lr above 0 for {name}, or freeze its tensors"
        elif s.pacer is not None and i not in gated:
            peak = s.pacer.groups[i].base["lr"]
            if peak - top > max(float(rates.stride[i]), NEAR * peak):
                yield (
                    f"{name} never reaches its peak of {rate(peak)}, {percent(top / peak)} of it at most",
                    f"let the schedule rise to 1, and set lr={rate(top)} if that is the rate you mean",
                )
        elif s.pacer is None and rising(rates, i) and not rising(rates):
            yield f"{name} is still rising when the run ends", f"give {name} the warmup of the others"


def _wasted(s: Subject, rates: Rates) -> Iterator[Wrong]:
    for i, name in enumerate(rates.names):
        if rates.highest[i] == 0:
            continue
        if rates.values[0, i] == 0 and i not in _gated(s):
            yield f"the first update of {name} has a rate of 0", _start_above_zero(s, i)
        n = _own(s, rates)
        if rates.values[n - 1, i] == 0:
            zeros = int((rates.values[:n, i] != 0)[::-1].argmax())
            share = (
                f"the last {percent(zeros / n)} of the updates of {name} have"
                if zeros > 1
                else (f"the last update of {name} has")
            )
            yield f"{share} a rate of 0", _end_above_zero(s)


def _own(s: Subject, rates: Rates) -> int:
    """The updates that are the schedule's own; that it is shorter than the run is another item's finding."""
    own = len(rates.values) if s.pacer is not None or s.own_length is None else s.own_length[0]
    return max(1, min(own, len(rates.values)))


def _start_above_zero(s: Subject, i: int) -> str:
    if s.pacer is None:
        return f"let {s.kind} give update i the factor (i + 1)/warmup, or start the warmup above 0"
    curve = s.pacer.groups[i].own or s.pacer.curve
    if curve.sample == "start" and curve.horizon.axis != "second":
        return "leave out '@ start': the default, sample = midpoint, has no update at the 0 of a warmup"
    clock = "a run in seconds takes its first update at second 0: " if curve.horizon.axis == "second" else ""
    return f"{clock}start the schedule above 0, as in '{replace(curve.schedule, start=0.01)}'"


def _end_above_zero(s: Subject) -> str:
    if s.curve is None:
        return f"make {s.kind} one update longer, or give it a floor above 0"
    if s.curve.sample == "end":
        return "leave out '@ end': the default, sample = midpoint, has no update at the 0 of a decay"
    return "let the decay end with the run: write it without a length and without a hold after it"


def _changed(s: Subject) -> Iterator[Wrong]:
    """Rates in the optimizer that are not the scheduler's: they last until the next update."""
    expected = [float(v) for v in s.scheduler.get_last_lr()]
    groups = [g for o in s.paced for g in o.param_groups]
    for i, (group, lr) in enumerate(zip(groups, expected, strict=False)):
        name, now = group.get("name", f"group{i}"), float(group["lr"])
        if abs(now - lr) > NEAR * max(abs(now), abs(lr)):
            yield (
                f"{name} has lr={rate(now)} in the optimizer, the scheduler has {rate(lr)} (initial_lr="
                f"{rate(float(group.get('initial_lr', lr)))}): the change is lost at the next update",
                "set the lr before the scheduler is built"
                + (", and remove 'initial_lr' from the group" if s.pacer is None else ", or use pacer.set_peak"),
            )


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    size: int
    undecayed: bool
    """Whether it should be left out of weight decay: a norm's gain, a bias; where roles are not known, 1-D."""
    trainable: bool


def decay(s: Subject) -> Finding:
    """Norms and biases do not decay, and every trainable tensor is in exactly one group."""
    where = _membership(s)
    if s.model is None:
        thin = [f"{g} ({shape})" for g, wd, shape in _thin(s) if wd]
        if thin:
            return bad(f"1-D tensors with weight decay in {some(thin)}", _split_off(s))
        return na("model= is not given: 1-D tensors do not decay; whether every tensor is in a group is not known")
    tensors, how = _tensors(s.model)
    problem = _lost(tensors, where) or _decaying(s, tensors, where, how)
    if problem is not None:
        return problem
    decayed = [t for key, t in tensors.items() if t.trainable and where[key][0][1] > 0]
    kept = sum(t.trainable for t in tensors.values()) - len(decayed)
    share = sum(t.size for t in decayed) / max(1, sum(t.size for t in tensors.values() if t.trainable))
    return ok(
        f"{len(decayed)} tensors decay ({percent(share)} of the trainable parameters), {kept} do not ({how}); all in "
        f"exactly one of {len(s.groups)} groups"
    )


Where = dict[int, list[tuple[str, float]]]


def _membership(s: Subject) -> Where:
    """id of a tensor -> (group, weight decay), once for every group that has it."""
    found: Where = {}
    for i, group in enumerate(s.groups):
        for p in group["params"]:
            found.setdefault(id(p), []).append((_called(group, i), float(group.get("weight_decay", 0.0))))
    return found


def _called(group: dict[str, Any], i: int) -> str:
    return str(group.get("name", f"group{i}"))


def _thin(s: Subject) -> Iterator[tuple[str, float, str]]:
    for i, group in enumerate(s.groups):
        for p in group["params"]:
            if p.ndim <= 1:
                yield _called(group, i), float(group.get("weight_decay", 0.0)), str(tuple(p.shape))


def _tensors(model: Any) -> tuple[dict[int, _Tensor], str]:
    """The model's tensors, with what is known of their roles."""
    from mupace.params import param_table

    try:
        table = param_table(model)
    except MatchError:  # a model with tensors of our unknown: their shape is all there is
        found = {id(p): _Tensor(name, p.numel(), p.ndim <= 1, p.requires_grad) for name, p in model.named_parameters()}
        return found, "by shape: 1-D, as the model has tensors without a known role"
    rows = {
        id(table.tensors[row.name]): _Tensor(row.name, row.numel, row.role in UNDECAYED, row.trainable) for row in table
    }
    return rows, "norms and biases"


def _lost(tensors: dict[int, _Tensor], where: Where) -> Finding | None:
    """A tensor in no group, in several, or a group with tensors of another model."""
    missing = [t.name for key, t in tensors.items() if t.trainable and key not in where]
    if missing:
        return bad(
            f"{len(missing)} trainable tensors are in no optimizer group and will never change: {some(missing)}",
            "give them to the optimizer, as mupace.groups does, or call requires_grad_(False) on them",
        )
    twice = [t.name for key, t in tensors.items() if len(where.get(key, ())) > 1]
    if twice:
        return bad(
            f"{len(twice)} tensors are in several groups and are updated more than once: {some(twice)}",
            "leave each tensor in one group",
        )
    strangers = len(where.keys() - tensors.keys())
    if strangers:
        return bad(
            f"{strangers} of the optimizer's {len(where)} tensors are not the model's: it was built for another model",
            "build the optimizer after the model is final (moved, wrapped, adapters added)",
        )
    return None


def _decaying(s: Subject, tensors: dict[int, _Tensor], where: Where, how: str) -> Finding | None:
    wrong = [t.name for key, t in tensors.items() if t.trainable and t.undecayed and where[key][0][1] > 0]
    if not wrong:
        return None
    return bad(f"{len(wrong)} tensors that should not decay ({how}) have weight decay: {some(wrong)}", _split_off(s))


def _split_off(s: Subject) -> str:
    if s.run is not None:
        return 'set [groups] no_decay = ["norm", "bias"] (the default)'
    return "give them a group with weight_decay=0: mupace.groups(model, lr=…, weight_decay=…) does"


def stage(s: Subject) -> Finding:
    """A post-training run does not start from a pretraining rate."""
    if s.stage is None:
        return na("stage= is not given")
    bound = next((p for p in PRESETS.values() if p.stage == s.stage and p.highest is not None), None)
    if bound is None or bound.highest is None:
        return na(f"stage {s.stage}: no bound, the peak is for a proxy to find")
    foreign = sorted({type(o).__name__ for o in s.optimizers if "betas" not in o.defaults})
    if foreign:
        return na(f"stage {s.stage}: the bound is one for Adam's rates, this is {', '.join(foreign)}")
    if isinstance(s.rates, str):
        return na(s.rates)
    tops = s.rates.highest.tolist() if s.pacer is None else [spec.base["lr"] for spec in s.pacer.groups]
    top, name = max(zip(tops, s.rates.names, strict=True), key=lambda pair: pair[0])
    evidence = f"stage {s.stage}: peak {rate(top)} ({name}), bound {rate(bound.highest)}; {bound.source}"
    if top > bound.highest:
        usual = "" if bound.peak is None else f" ({rate(bound.peak)} is the preset's)"
        return bad(evidence, f"lower the lr of {name} to {rate(bound.highest)} or less{usual}")
    return ok(evidence)
