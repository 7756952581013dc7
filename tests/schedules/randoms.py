"""Schedules for the tests of their laws: one of every family, and random ones."""

from __future__ import annotations

from hypothesis import strategies as st

from mupace.errors import ConfigError
from mupace.schedules import Phase, Schedule
from mupace.schedules import families as f
from mupace.units import Span

FAMILIES: dict[str, Schedule] = {
    "constant": f.constant("5%"),
    "linear": f.linear("5%"),
    "linear to a floor, no warmup": f.linear(floor=0.1),
    "cosine": f.cosine("5%", 0.1),
    "polynomial": f.polynomial(2.5, "5%", 0.05),
    "exponential": f.exponential(0.01, "5%"),
    "step_decay": f.step_decay(0.5, "15%", "5%"),
    "inverse_sqrt": f.inverse_sqrt("5%"),
    "power": f.power("10%", warmup="5%", cooldown="20%"),
    "wsd sqrt": f.wsd("2%", "20%"),
    "wsd linear": f.wsd("2%", "20%", "linear", 0.1),
    "wsd cosine": f.wsd("2%", "20%", "cosine"),
    "wsd square": f.wsd("2%", "20%", "square"),
    "wsd exp": f.wsd("2%", "20%", "exp", 0.01),
    "one_cycle": f.one_cycle()[0],
    "one_cycle momentum": f.one_cycle()[1],
    "cyclic": f.cyclic(4, 0.2),
    "restarts": f.restarts(3, 0.1, "4%", 2.0),
    "windows": f.windows([("20%", "10%"), ("30%", "20%")], bias=0.05),
    "sampled": f.sampled(f.linear("5%"), "end"),
}

SHARES = st.floats(0.0, 1.0, allow_subnormal=False).map(lambda v: round(v, 6))
POSITIVE = st.floats(0.25, 4.0)
LENGTHS = st.one_of(
    st.integers(1, 200).map(lambda n: Span(n, "step")), st.integers(1, 40).map(lambda n: Span(n / 200, "fraction"))
)
ARGS = {
    "hold": st.just({}),
    "linear": st.just({}),
    "cosine": st.one_of(st.just({}), st.fixed_dictionaries({"p": POSITIVE, "k": POSITIVE})),
    "sqrt": st.just({}),
    "square": st.just({}),
    "poly": st.fixed_dictionaries({"p": POSITIVE}),
    "wave": st.fixed_dictionaries({"cycles": st.sampled_from([0.5, 1.0, 1.5, 2.0, 0.7])}),
    "decay": st.fixed_dictionaries({"tau": LENGTHS, "bias": SHARES}),
    "power": st.fixed_dictionaries({"scale": LENGTHS, "exponent": st.floats(-2.0, 0.0)}),
    "inv_sqrt": st.fixed_dictionaries({"scale": LENGTHS}),
    "step": st.fixed_dictionaries({"factor": SHARES, "every": LENGTHS}),
    "table": st.fixed_dictionaries({"values": st.lists(SHARES, min_size=1, max_size=6).map(tuple)}),
}  # exp has its own tests: what it may begin at depends on the phase before
OWN_END = ("hold", "decay", "power", "inv_sqrt", "step", "table")


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    shape = draw(st.sampled_from(sorted(ARGS)))
    return Phase(
        shape=shape,
        span=draw(LENGTHS),
        end=None if shape in OWN_END else draw(SHARES),
        begin=draw(st.one_of(st.none(), st.none(), SHARES)) if shape != "table" else None,
        args=tuple(draw(ARGS[shape]).items()),
    )


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """One to five phases, at most 5 · 200 steps of 1000 long, one of them perhaps without a length."""
    rows = draw(st.lists(phases(), min_size=1, max_size=5))
    i = draw(st.one_of(st.none(), st.integers(0, len(rows) - 1)))
    if i is not None and sum(r.span.value if r.span and r.span.unit == "step" else 200 for r in rows) <= 1000:
        rows[i] = Phase(shape=rows[i].shape, end=rows[i].end, begin=rows[i].begin, args=rows[i].args)
    start = None if rows[0].begin is not None or rows[0].shape == "table" else draw(st.one_of(st.none(), SHARES))
    try:
        return Schedule(phases=tuple(rows), start=start, sample=draw(st.sampled_from(["midpoint", "start", "end"])))
    except ConfigError as error:  # pragma: no cover - the generator only makes legal ones
        raise AssertionError(error) from error
