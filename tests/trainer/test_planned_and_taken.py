"""What a run took is what its record says was planned, for every group, also after the plan changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import config, here, run

from mupace.record import read
from mupace.report.plan import Trace, traces

__all__ = ["here"]

RULES = [
    {"select": "embedding", "unfreeze": "25%"},
    {"select": "head", "schedule": "warmup 50% | cosine -> 0.1"},
    {"select": "ffn", "floor": 0.3},
    {"select": "norm", "lr": 0.5},
]


def by_group(found: list[Trace]) -> dict[str, Trace]:
    return {name: trace for trace in found for name in trace.names}


def test_every_group_follows_its_plan_through_an_extension() -> None:
    c = config(12, groups__rules=RULES)
    run(c)
    run(c, replan=lambda pacer: pacer.extend("20 steps", rule="redecay", reason="more text"))
    found = by_group(traces(read("run")))
    assert len(found) >= 5
    for name, trace in found.items():
        assert trace.exact, name
        assert len(trace.x) == 20, name
        assert trace.deviation is not None, name
        assert trace.deviation < 1e-12, name


def test_a_total_that_is_no_whole_number_of_updates() -> None:
    """The last update has a part of its interval in the run, and takes its rate from there."""
    _, record = run(config("740 tokens", groups__rules=RULES))  # 11.6 updates of 64 tokens
    assert record.updates["step"][-1] == 12
    for name, trace in by_group(traces(record)).items():
        assert trace.deviation is not None, name
        assert trace.deviation < 1e-12, name
        assert trace.taken[-1] > 0, name


def test_a_rate_that_was_not_planned_shows() -> None:
    """The negative control: one update's rate is changed in the record."""
    run(config(12, groups__rules=RULES))
    record = Path("run/record.rank0.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    row = next(r for r in rows if r["type"] == "update" and r["step"] == 7)
    name = next(iter(row["lr"]))
    row["lr"][name] *= 1.01
    record.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert by_group(traces(read("run")))[name].deviation == pytest.approx(0.01, rel=0.5)
