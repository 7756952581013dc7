"""The layer policy: quiet and loud traces, ranges, what is no evidence, no drift, purity."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from families import llama
from mupace.errors import ConfigError
from mupace.params.presets import ROLE_PRESETS
from mupace.policies import Proposal, Reading, policy_of, policy_to_dict
from mupace.policies.layer import LayerPolicy, _mean, _student
from mupace.scales import groups, role_policy
from mupace.units import Clock

POLICY = LayerPolicy()


class Run:
    """A run of nothing but ratios: r(role) = level(role) · trim · schedule · noise, read every 10 updates."""

    def __init__(
        self,
        levels: dict[str, float],
        *,
        noise: float = 0.2,
        schedule: Callable[[float], float] = lambda progress: 1.0,
        readings: int = 400,
        seed: int = 0,
    ) -> None:
        self.levels, self.noise, self.schedule, self.readings = levels, noise, schedule, readings
        self.trims = dict.fromkeys(levels, 1.0)
        self.draw = random.Random(seed)
        self.lr_sum = 0.0

    def reading(self, i: int, **changes: Any) -> Reading:
        factor = self.schedule(i / self.readings)
        self.lr_sum += 10 * factor
        values = {"lr_sum": self.lr_sum}
        for role, level in sorted(self.levels.items()):
            noise = math.exp(self.draw.gauss(0, self.noise))
            values[f"update_ratio.{role}"] = level * self.trims[role] * factor * noise
            values[f"trim.layer.{role}"] = self.trims[role]
        values |= changes.pop("values", {})
        return Reading(clock=Clock(step=10 * (i + 1)), values=values, **changes)

    def closed(self, policy: LayerPolicy = POLICY) -> Iterator[tuple[int, Proposal]]:
        """Every proposal, applied at once."""
        state = policy.init()
        for i in range(self.readings):
            proposals, state = policy.step(self.reading(i), state)
            for proposal in proposals:
                self.trims[proposal.target] *= proposal.factor
                yield i, proposal


def test_the_quiet_trace() -> None:
    """Ratios within a factor of two of the target, noise or not: nothing."""
    levels = {"embedding": 1.8e-3, "norm": 0.6e-3, "ffn": 1e-1}
    for noise in (0.0, 0.3):
        assert list(Run(levels, noise=noise).closed()) == []


def test_the_loud_trace() -> None:
    """Too fast an embedding goes down to the end of its range and stays there, too slow a norm up to its own."""
    run = Run({"embedding": 2e-2, "norm": 5e-5, "ffn": 1e-1})
    made = list(run.closed())
    assert {p.target: p.reason for _, p in made} == {"embedding": "update_ratio_high", "norm": "update_ratio_low"}
    assert all((p.factor < 1) is (p.target == "embedding") for _, p in made)
    assert run.trims["embedding"] == pytest.approx(0.60 / 0.675)
    assert run.trims["norm"] == pytest.approx(0.50 / 0.40)
    first = made[0][1]
    assert (first.kind, first.field, first.judged, first.ramp) == ("scale", "lr", False, 50)
    assert first.factor == pytest.approx(1 / 1.05)
    assert first.evidence["ratio"] == pytest.approx(2e-2, rel=0.2)
    assert made[-1][0] < 250  # at the end of the range nothing more is proposed
    for target in ("embedding", "norm"):
        at = [i for i, p in made if p.target == target]
        assert min(b - a for a, b in pairwise(at)) >= POLICY.window + POLICY.dwell


def test_within_the_range_it_settles_at_the_edge_of_the_band() -> None:
    policy = LayerPolicy(preset="sharpness", gain=1.0)
    run = Run({"embedding": 2.2e-3}, noise=0.02)
    assert len(list(run.closed(policy))) >= 2
    assert 2.2 * run.trims["embedding"] == pytest.approx(2.0, rel=0.03)
    assert 0.8 < run.trims["embedding"] < 1


def test_a_saturated_run_comes_back_at_once() -> None:
    """Anti-windup: however long a role stood at the end of its range, it leaves it as soon as the ratio turns."""
    for stood in (100, 2000):
        run = Run({"norm": 5e-5}, readings=stood)
        list(run.closed())
        state: Any = POLICY.init()
        for i in range(stood):
            _, state = POLICY.step(run.reading(i), state)
        run.levels["norm"] = 1e-2
        turned = []
        for i in range(60):
            proposals, state = POLICY.step(run.reading(stood + i), state)
            turned += [i for p in proposals if p.factor < 1]
        assert turned
        assert turned[0] <= POLICY.window


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("correlated", [False, True])
def test_noise_inside_the_band_never_moves_anything(seed: int, correlated: bool) -> None:
    """10^4 readings; the control below shows that the same noise outside the band does."""
    draw, state, x = random.Random(seed), POLICY.init(), 0.0
    for i in range(10_000):
        x = 0.8 * x + draw.gauss(0, 0.18) if correlated else draw.gauss(0, 0.3)
        ratio = 1e-3 * math.exp(x + 0.3)
        values = {"lr_sum": 10.0 * (i + 1), "update_ratio.norm": ratio, "trim.layer.norm": 1.0}
        proposals, state = POLICY.step(Reading(clock=Clock(step=10 * (i + 1)), values=values), state)
        assert proposals == ()


def test_the_same_noise_outside_the_band_does() -> None:
    assert list(Run({"norm": 6e-3}, noise=0.3).closed())


def series(seed: int, rho: float, n: int = 40) -> list[float]:
    draw, last, out = random.Random(seed), random.Random(-seed - 1).gauss(0, 1), []
    for _ in range(n):
        last = rho * last + math.sqrt(1 - rho * rho) * draw.gauss(0, 1)
        out.append(last)
    return out


def test_the_error_of_a_mean_is_that_of_as_many_values_as_are_independent() -> None:
    for seed in range(30):
        values = series(seed, 0.6)
        mean = sum(values) / 40
        off = [v - mean for v in values]
        measured = sum(a * b for a, b in pairwise(off)) / sum(v * v for v in off)
        rho = max(0.0, (40 * measured + 1) / 36)  # measured = rho - (1 + 4 rho)/40
        independent = 40 * (1 - rho) / (1 + rho)
        found = _mean(values)
        assert found.value == pytest.approx(mean)
        assert found.freedom == pytest.approx(independent - 1)
        assert found.error == pytest.approx(math.sqrt(sum(v * v for v in off) / 40 / (independent - 1)))


@pytest.mark.parametrize(("t", "dof", "normal"), [(2.228, 10, 1.960), (3.169, 10, 2.576), (2.042, 30, 1.960)])
def test_a_normal_deviate_becomes_the_t_value_of_its_tail(t: float, dof: float, normal: float) -> None:
    assert _student(normal, dof) == pytest.approx(t, rel=0.01)


def test_few_independent_readings_need_more_standard_errors() -> None:
    policy = LayerPolicy(relative=False, dwell=0)
    for seed in range(5):
        noise = [0.1 * x for x in series(seed, 0.6)]
        mean, error, freedom = _mean(noise)
        needed = _student(3.0, freedom)
        assert needed > 3.1
        for errors, moved in ((0.5 * (3.0 + needed), False), (1.05 * needed, True)):
            shift, state, found = math.log(policy.band) + errors * error - mean, policy.init(), ()
            for i, x in enumerate(noise, 1):
                values = {"update_ratio.norm": 1e-3 * math.exp(x + shift), "trim.layer.norm": 1.0}
                found, state = policy.step(Reading(clock=Clock(step=i), values=values), state)
            assert bool(found) == moved
            assert errors > 3.0  # the control: by the normal deviate both would be moved


def test_correlated_noise_at_the_edge_is_seldom_beyond_it() -> None:
    found = [_mean(series(seed, 0.8)) for seed in range(1000)]
    beyond = [m.freedom > 0 and m.value > _student(3.0, m.freedom) * m.error for m in found]
    blind = [m.value > 3.0 * statistics.stdev(series(seed, 0.8)) / math.sqrt(40) for seed, m in enumerate(found)]
    assert sum(beyond) < 20
    assert sum(blind) > 100  # the control: all readings taken for independent


def test_the_schedule_and_the_rate_of_all_move_nothing() -> None:
    """A decay to zero divides every ratio by more and more; raw ratios, the control, drive the role up."""

    def warmup_and_decay(progress: float) -> float:
        return min(1.0, 20 * progress + 0.01) * (1 - progress)

    run = Run({"norm": 1e-3, "embedding": 1e-3}, schedule=warmup_and_decay)
    assert list(run.closed()) == []
    raw = Run({"norm": 1e-3, "embedding": 1e-3}, schedule=warmup_and_decay)
    assert any(p.factor > 1 for _, p in raw.closed(LayerPolicy(relative=False)))


@pytest.mark.parametrize(
    "lost", ["update_ratio.norm", "trim.layer.norm", "lr_sum"], ids=["no ratio", "position unknown", "schedule unknown"]
)
def test_what_is_missing_is_no_evidence(lost: str) -> None:
    run, state = Run({"norm": 5e-5}), POLICY.init()
    for i in range(100):
        reading = run.reading(i)
        rest = {name: value for name, value in reading.values.items() if name != lost}
        proposals, state = POLICY.step(Reading(clock=reading.clock, values=rest, lost=(lost,)), state)
        assert proposals == ()
    assert POLICY.step(run.reading(100), state)[0] == () or lost == "trim.layer.norm"


def test_gaps_only_make_it_slower() -> None:
    run, state, first = Run({"norm": 5e-5}), POLICY.init(), []
    for i in range(200):
        reading = run.reading(i)
        rest = {k: v for k, v in reading.values.items() if i % 2 or not k.startswith("update_ratio")}
        proposals, state = POLICY.step(Reading(clock=reading.clock, values=rest), state)
        first += [i for _ in proposals]
    assert first[0] >= 2 * POLICY.window - 2


@pytest.mark.parametrize(
    ("event", "breaks"),
    [
        ("data", True),
        ("manual", True),
        ("rollback", True),
        ("acted:mine", True),
        ("acted:time", False),
        ("acted:layer", False),
        ("resume", False),
    ],
)
def test_events_break_the_window(event: str, breaks: bool) -> None:
    run, state = Run({"norm": 5e-5}), POLICY.init()
    for i in range(POLICY.window):
        assert POLICY.step(run.reading(i), state)[0] == ()
        _, state = POLICY.step(run.reading(i), state)
    proposals, _ = POLICY.step(run.reading(POLICY.window, events=(event,)), state)
    assert (proposals == ()) is breaks


def test_every_group_of_a_role_stays_in_the_range() -> None:
    """Groups that are named by place and role: the one that stands farthest decides."""
    limit = 0.50 / 0.40
    for trims, wanted in (((1.0, 1.24), limit / 1.24), ((1.0, limit), None), ((1.0, 1.0), 1.05)):
        policy, state = LayerPolicy(relative=False), POLICY.init()
        named = {f"trim.layer.block.{i} norm x0.4": trim for i, trim in enumerate(trims)}
        proposals: tuple[Proposal, ...] = ()
        for i in range(policy.window):
            values = {"update_ratio.norm": 5e-5, "trim.layer.no_decay": 1.0, **named}
            proposals, state = policy.step(Reading(clock=Clock(step=i), values=values), state)
        assert [p.factor for p in proposals] == ([] if wanted is None else [pytest.approx(wanted)])


def test_it_is_pure_and_its_state_is_json() -> None:
    run, state = Run({"norm": 5e-5, "embedding": 1e-2}), POLICY.init()
    readings = [run.reading(i) for i in range(80)]
    for reading in readings:
        before = copy.deepcopy(state)
        first, second = POLICY.step(reading, state), POLICY.step(Reading.from_dict(reading.to_dict()), state)
        assert state == before
        assert first == second
        assert json.dumps(first[1]) == json.dumps(second[1])
        state = json.loads(json.dumps(first[1], allow_nan=False))
        assert state == first[1]


def test_options_are_checked_and_it_is_in_the_registry() -> None:
    made = policy_of("layer", {"preset": "sharpness", "window": 12})
    assert made == LayerPolicy(preset="sharpness", window=12)
    options = policy_to_dict(made)
    assert policy_of(options.pop("name"), options) == made
    bad: list[dict[str, Any]] = [
        {"preset": "speed"},
        {"target": 0.0},
        {"band": 1.0},
        {"gain": 1.5},
        {"largest": 1},
        {"window": 7},
        {"dwell": -1},
        {"ramp": True},
        {"significance": math.nan},
        {"relative": 1},
    ]
    for row in bad:
        with pytest.raises(ConfigError, match=next(iter(row))):
            LayerPolicy(**row)


@pytest.mark.parametrize("preset", sorted(ROLE_PRESETS))
def test_its_roles_are_groups_that_can_be_split(preset: str) -> None:
    policy = LayerPolicy(preset=preset)
    table = ROLE_PRESETS[preset]
    assert "ffn" not in policy.roles
    for role, (low, high) in policy.ranges.items():
        assert low < 1 < high
        assert (low * table[role][2], high * table[role][2]) == pytest.approx(table[role][:2])
    made = groups(llama(), role_policy(preset), lr=1e-3, weight_decay=0.1, split=policy.roles)
    named = {group["name"] for group in made if group.get("role") in policy.roles}
    assert named == {role for role in policy.roles if role != "attention_qkv"}
