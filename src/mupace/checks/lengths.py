"""Items about lengths: units, the total, what was written, and the end points of the curve."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mupace.checks.groups import Wrong, rising
from mupace.checks.numbers import amount, percent, plural, rate, some
from mupace.checks.rates import Rates
from mupace.checks.report import Finding, bad, na, ok
from mupace.checks.subject import Subject
from mupace.schedules import Curve, Piece
from mupace.units import Horizon

OFF = 0.05  # house rule: a run that is more than this from what was written is not what was meant
ENDS = 0.01  # house rule: a schedule may end this share of the run before its end


def units(s: Subject) -> Finding:
    """Every length in optimizer updates, after accumulation, and in tokens."""
    if s.curve is not None:
        return _units_of_curve(s.curve)
    if isinstance(s.rates, str):
        return na(s.rates)
    return _units_of_rates(s, s.rates)


def _units_of_curve(curve: Curve) -> Finding:
    h = curve.horizon
    if h.steps is None:
        return na(f"a total of {h.total} has no number of updates without {h.axis}s per update, a measured rate")
    parts = [(p, _name(curve, p), _updates(curve, p)) for p in curve.pieces]
    moving = [part for part in parts if part[0].b != part[0].a or not part[0].open_ended]
    evidence = "; ".join([_length("total", str(h.total), 0, h.steps, h), *(_of_piece(*part, h) for part in parts)])
    wrong = [*_short(moving, h.steps), *_early(curve, h.steps)]
    if wrong:
        return bad(f"{evidence}: {'; '.join(w for w, _ in wrong)}", "; ".join(r for _, r in wrong))
    return ok(evidence)


Part = tuple[Piece, str, tuple[float, float]]  # a phase, its name, where it begins and ends in updates


def _short(moving: list[Part], steps: int) -> Iterator[Wrong]:
    for _, name, (begin, end) in moving:
        if end - begin < 1 - 1e-9:
            yield (
                f"{name} is over within one update",
                f"make {name} 1 update or longer: write '{name} 1 step' (here {percent(1 / steps)} of the run), or "
                "leave it out",
            )


def _early(curve: Curve, steps: int) -> Iterator[Wrong]:
    """A schedule that ends before the run does, without a hold that says so."""
    last, h = curve.pieces[-1], curve.horizon
    if last.x + last.stop < h.length * (1 - ENDS):
        end = curve.edges()[-1][0]
        yield (
            f"the schedule finishes at update {amount(end)} of {amount(steps)}, {percent(end / steps)} of the run, and "
            f"stands at {rate(curve.final)} of the peak from there on",
            "write the last phase without its length, so that it takes what is left of the run, or add '| hold' if "
            "that is meant",
        )


def _name(curve: Curve, piece: Piece) -> str:
    rises = piece is curve.pieces[0] and curve.warmup_end is not None
    return "warmup" if rises else piece.phase.shape


def _updates(curve: Curve, piece: Piece) -> tuple[float, float]:
    """Where a piece begins and ends, in updates."""
    h = curve.horizon
    return float(h.to_steps(piece.x, h.axis)), float(h.to_steps(piece.x + piece.stop, h.axis))


def _of_piece(piece: Piece, name: str, at: tuple[float, float], h: Horizon) -> str:
    span = piece.phase.until or piece.phase.span
    return _length(name, "the rest" if span is None else str(span), *at, h)


def _length(name: str, written: str, begin: float, end: float, h: Horizon) -> str:
    """warmup 2% = 46 updates = 24.1M tokens"""
    n = round(end - begin, 9)
    same = written in (f"{n:g} steps", f"{n:g} step")
    words = [f"{name} {written}", *([] if same else [plural(n, "update")])]
    if h.tokens_per_step is not None and h.total.unit != "token":
        words.append(f"{amount(round(float(h.from_steps(end, 'token') - h.from_steps(begin, 'token'))))} tokens")
    return " = ".join(words)


def _units_of_rates(s: Subject, rates: Rates) -> Finding:
    """For a scheduler that says nothing about its phases: what its rates do."""
    lead = int(np.argmax(rates.highest))
    series = rates.values[:, lead]
    n, top = len(series), int(np.argmax(series))
    warmup = top if series[0] < series[top] else 0
    changes = np.flatnonzero(np.diff(series))
    last = int(changes[-1]) + 1 if len(changes) else 0
    evidence = (
        f"{plural(n, 'update')}: {f'a rise of {amount(warmup)}' if warmup else 'no warmup'}, from {rate(series[0])} to "
        f"{rate(series[top])}, and the end at {rate(series[-1])}"
    )
    if s.accumulate > 1:
        evidence += f"; one update is {s.accumulate} micro-batches"
    if rising(rates):
        return bad(
            f"{evidence}: it is still rising when the run ends",
            f"make the warmup shorter than the run's {plural(n, 'update')}{_divided(s)}, and the floor (eta_min) lower "
            "than the lr",
        )
    if s.own_length is None and last and series[last] < series[top] and last < n * (1 - ENDS):
        return bad(
            f"{evidence}: it finishes at update {amount(last)} of {amount(n)}, {percent(last / n)} of the run",
            f"build {s.kind} for {amount(n)} updates, or say total= if the run is shorter",
        )
    return ok(evidence)


def _divided(s: Subject) -> str:
    return f" (a count of micro-batches divided by accumulate={s.accumulate})" if s.accumulate > 1 else ""


def total(s: Subject) -> Finding:
    """The written total, the scheduler's length and the loop's updates are one number; tokens = steps · B · T_seq."""
    short = _unconverted(s)
    if short:
        return na(short)
    known = _lengths(s)
    if len(known) < 2 and s.run is None:
        return na("nothing to compare with: give updates= (what the loop will make) or total=")
    recomputed = "" if s.horizon is None or s.horizon.steps is None else _recomputed(s.horizon)
    evidence = "; ".join(filter(None, [*(f"{what}: {plural(n, 'update')}" for n, what in known), recomputed]))
    worst = next(((n, what) for n, what in known[1:] if abs(n - known[0][0]) > max(1, ENDS * known[0][0])), None)
    if worst is not None:
        return bad(evidence, _agree(s, known[0], worst))
    over = _excess(s)
    if s.horizon is not None and over > OFF:
        return bad(f"{evidence}, {percent(over)} more than written", _whole(s.horizon))
    return ok(evidence + _passes(s))


def _unconverted(s: Subject) -> str:
    if s.horizon is None or s.horizon.steps is not None:
        return ""
    needs = {"token": "samples_per_step= and tokens_per_sample=", "sample": "samples_per_step="}.get(s.horizon.axis)
    why = f"give {needs}" if needs else "it depends on the speed of the machine"
    return f"a total of {s.horizon.total} has no number of updates: {why}"


def _lengths(s: Subject) -> list[tuple[int, str]]:
    """Every number of updates that is known, the loop's own first."""
    own = None if s.own_length is None else s.own_length
    planned = None if s.total is None or s.horizon is None else s.horizon.steps
    return [
        *([] if s.updates is None else [(s.updates, "the loop makes")]),
        *([] if planned is None or s.run is not None else [(planned, f"a total of {s.total}")]),
        *([] if own is None or s.run is not None else [own]),
    ]


def _recomputed(h: Horizon) -> str:
    assert h.steps is not None
    if not isinstance(h.samples_per_step, int) or h.tokens_per_sample is None:
        done = h.clock(h.steps).token
        return f"{plural(done, 'token')} in all" if done else ""
    tokens = h.steps * h.samples_per_step * h.tokens_per_sample
    return (
        f"{amount(h.steps)} updates × {amount(h.samples_per_step)} samples × {amount(h.tokens_per_sample)} tokens = "
        f"{plural(tokens, 'token')}, total={str(h.total)!r}"
    )


def _excess(s: Subject) -> float:
    """How much more the whole updates consume than was written, as a share of it."""
    h = s.horizon
    if h is None or h.steps is None:
        return 0.0
    unit = h.total.unit
    if unit in ("token", "sample"):
        return float(h.from_steps(h.steps, unit)) / h.total.value - 1
    if unit == "epoch" and h.samples_per_epoch is not None and isinstance(h.samples_per_step, int):
        return h.steps * h.samples_per_step / h.samples_per_epoch / h.total.value - 1
    return 0.0


def _whole(h: Horizon) -> str:
    n = h.steps
    if h.total.unit == "epoch" and h.samples_per_epoch is not None and isinstance(h.samples_per_step, int):
        n = max(1, round(h.total.value * h.samples_per_epoch / h.samples_per_step))
    return f"write total='{n} step{'' if n == 1 else 's'}', or take a smaller batch"


def _passes(s: Subject) -> str:
    if s.data is None or s.horizon is None or s.horizon.steps is None:
        return ""
    samples = s.horizon.clock(s.horizon.steps).sample
    passes = samples / len(s.data.train)
    return f"; {amount(round(passes, 2))} times over {plural(len(s.data.train), 'sample')}"


def _agree(s: Subject, first: tuple[int, str], other: tuple[int, str]) -> str:
    (n, what), (m, where) = first, other
    if m == n * s.accumulate and s.accumulate > 1:
        return f"{where} counts micro-batches: divide it by accumulate={s.accumulate}, which gives {amount(n)}"
    effect = (
        f"the schedule is {percent(n / m)} done when the run ends"
        if m > n
        else f"the schedule is done at {percent(m / n)} of the run"
    )
    return f"{what} {amount(n)} updates and {where} says {amount(m)} ({effect}): make both the same"


def written(s: Subject) -> Finding:
    """No length is a bare number."""
    if isinstance(s.total, int):
        return bad(f"total={s.total} has no unit", f"write total='{s.total} steps'")
    if s.curve is not None:
        lengths = [str(p.span) for p in s.curve.schedule.phases if p.span is not None]
        return ok(f"total {s.curve.horizon.total}, phases {some(lengths, 6) if lengths else 'without a length'}")
    if s.total is None:
        number = "its lengths are" if s.own_length is None else f"{s.own_length[1]} = {s.own_length[0]} is"
        what = f"say what is counted: give total='{s.length or 1000} steps' (updates, not micro-batches)"
        return bad(f"{s.kind}: {number} a number without a unit", f"{what}, or use mupace.schedule")
    own = "" if s.own_length is None else f"; {s.own_length[1]} = {s.own_length[0]} is read as steps"
    return ok(f"total {s.total}{own}")


def endpoints(s: Subject) -> Finding:
    """What is plotted begins, peaks and ends where the text says, and holds after the end."""
    if isinstance(s.rates, str):
        return na(s.rates)
    claims = _claimed(s, s.rates)
    numbers = _numbers(s, s.rates)
    for what, said, found, close in claims:
        if abs(found - said) > close:
            return bad(f"{numbers}: the {what} is {rate(found)}, not {rate(said)}", _mend(s, what, said, found))
    if s.pacer is None and not claims:
        return na(f"{numbers}; nothing to compare with: give peak= and floor= as your plan has them")
    if s.pacer is not None and np.ptp(s.rates.after, axis=0).max() > 0:
        return bad(f"{numbers}: it moves on after the end", "end the last phase at the total")
    return ok(numbers)


Claim = tuple[str, float, float, float]  # what, as written, as found, how far apart is still the same


def _claimed(s: Subject, rates: Rates) -> list[Claim]:
    lead = int(np.argmax(rates.highest))
    end = rates.after[0, lead] if len(rates.after) else rates.values[-1, lead]
    close = 1.001 * float(rates.stride[lead])  # an update may stand on either side of the point that is meant
    said = [("peak", s.peak, rates.highest[lead]), ("floor", s.floor, end)]
    claims = [(what, float(v), float(found), close) for what, v, found in said if v is not None]
    return claims + ([] if s.pacer is None else _of_text(s, rates))


def _of_text(s: Subject, rates: Rates) -> list[Claim]:
    """The numbers in the schedule's text against those of the curve and of the groups."""
    assert s.pacer is not None
    curve, last = s.pacer.curve, s.pacer.curve.schedule.phases[-1]
    close = 1e-9
    claims = [("start", curve.schedule.start, curve(0.0, curve.horizon.axis), close)]
    if curve.warmup_end is not None and curve.pieces[0].phase.end is not None:
        top = float(curve.pieces[0].phase.end)
        claims.append(("end of the warmup", top, curve(curve.warmup_end, curve.horizon.axis), close))
    floor = curve.floor if curve.floor is not None else None if last.until else last.end
    if floor is not None:
        claims.append(("floor", floor, curve(curve.horizon.length, curve.horizon.axis), close))
    for i, spec in enumerate(s.pacer.groups):
        if spec.floor is not None:
            found = float(rates.after[0, i]) / (spec.base["lr"] or 1.0)
            claims.append((f"floor of {spec.name}", spec.floor, found, close))
    return claims


def _numbers(s: Subject, rates: Rates) -> str:
    lead = int(np.argmax(rates.highest))
    series, after = rates.values[:, lead], rates.after[:, lead]
    top = int(np.argmax(series))
    words = [
        f"first update {rate(series[0])}",
        f"highest {rate(series[top])} (update {amount(rates.steps[top] + 1)})",
        f"last {rate(series[-1])}",
    ]
    if len(after):
        moves = float(after[-1]) != float(after[0])
        words.append(f"after the end {rate(after[0])}" + (f", then {rate(after[-1])}" if moves else ", held"))
    elif rates.stopped:
        words.append(f"then {rates.stopped}")
    return f"{rates.names[lead]}: {', '.join(words)}"


def _mend(s: Subject, what: str, said: float, found: float) -> str:
    if s.pacer is None:
        return f"set the {what} in {s.kind}, or write what you mean: {what}={rate(found)}"
    if what.startswith("floor"):
        return (
            f"a floor of {rate(said)} needs a schedule that comes down from its peak: end it with a decay, or leave "
            "the floor out"
        )
    return f"write the {what} as {rate(found)}"
