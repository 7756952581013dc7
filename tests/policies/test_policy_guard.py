"""The recovery ladder: every rung on a loud trace, none on a quiet one; what survives a rollback; JSON state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from mupace.errors import ConfigError
from mupace.policies import Proposal, Reading
from mupace.policies.guard import GuardPolicy, poisson_tail
from mupace.units import Clock

EVERY = 10


class Loop:
    """A training loop's side of the contract: asks before every update, makes a reading every ten, carries out."""

    def __init__(self, policy: GuardPolicy | None = None, *, keeps_budget: bool = True) -> None:
        self.policy = policy or GuardPolicy()
        self.state = self.policy.init()
        self.keeps_budget = keeps_budget
        self.step = self.tried = 0
        self.trim = 1.0
        self.events: list[str] = []
        self.said: list[tuple[int, Proposal]] = []
        self.admitted: list[bool] = []
        self.saved: tuple[int, float, str] | None = None

    def save(self) -> None:
        self.saved = (self.step, self.trim, json.dumps(self.state, allow_nan=False))

    def run(self, values: Iterable[tuple[float, float]]) -> Loop:
        for loss, norm in values:
            good, _, self.state = self.policy.admit(self.state, self.step, loss, norm)
            self.admitted.append(good)
            self.step += good
            self.tried += 1
            if self.tried % EVERY == 0:
                self.read()
        return self

    def read(self, **more: Any) -> None:
        clock = Clock(step=self.step)
        seen = Reading(clock=clock, values={"trim.guard.body": self.trim}, events=tuple(self.events), **more)
        self.events = []
        proposals, self.state = self.policy.step(seen, self.state)
        for p in proposals:
            self.said.append((self.tried, p))
            self.carry_out(p)

    def carry_out(self, p: Proposal) -> None:
        if p.kind == "scale":
            self.trim *= p.factor
            self.events.append("acted:guard")
        if p.kind == "rollback" and self.saved is not None:
            budget = self.state["budget"]
            self.step, self.trim, kept = self.saved[0], self.saved[1], json.loads(self.saved[2])
            self.state = {**kept, "budget": budget} if self.keeps_budget else kept
            self.events.append("rollback")

    @property
    def reasons(self) -> list[str]:
        return [p.reason for _, p in self.said]


def noise(n: int, seed: int = 0, level: float = 2.0, sd: float = 0.05) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    losses, norms = level + sd * rng.normal(size=n), np.exp(0.2 * rng.normal(size=n))
    return [(float(a), float(b)) for a, b in zip(losses, norms, strict=True)]


SPIKE = (9.0, 30.0)
NAN = (math.nan, 1.0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ((math.nan, 1.0), "nonfinite_loss"),
        ((2.0, math.inf), "nonfinite_grad_norm"),
        ((2.0, math.nan), "nonfinite_grad_norm"),
        ((9.0, 1.0), "loss_spike"),
        ((2.0, 50.0), "grad_norm_spike"),
    ],
)
def test_one_bad_update_is_left_out_and_nothing_else_happens(value: tuple[float, float], reason: str) -> None:
    loop = Loop().run(noise(200))
    good, why, after = loop.policy.admit(loop.state, loop.step, *value)
    assert (good, why) == (False, reason)
    assert after["losses"] == loop.state["losses"]
    assert after["norms"] == loop.state["norms"]
    loop.run([value, *noise(400, seed=1)])
    assert loop.admitted.count(False) == 1
    assert loop.said == []


def test_no_judgement_before_enough_is_known_but_nan_never_passes() -> None:
    loop = Loop().run([*noise(63), SPIKE])
    assert loop.admitted[-1]
    loop = Loop().run([*noise(64), SPIKE])
    assert not loop.admitted[-1]
    assert Loop().run([NAN]).admitted == [False]


def test_an_early_overflow_does_not_mount_the_ladder() -> None:
    """A float16 loss scale finds its size by a dozen overflows; on end they are left out, and that is all."""
    assert Loop().run([(5.0, math.inf)] * 15 + noise(300)).said == []
    assert "guard_rollback_nonfinite" in Loop().run([(5.0, math.inf)] * 40).reasons  # the control: it does not end


def test_two_skips_back_off_and_the_rates_return() -> None:
    loop = Loop().run([*noise(200), SPIKE, *noise(5), SPIKE, *noise(300, seed=1)])
    assert loop.reasons == ["guard_back_off", "guard_rewarm"]
    (_, back), (_, up) = loop.said
    assert (back.factor, back.target, up.factor, up.ramp) == (0.5, "all", 2.0, 100)
    assert not back.judged
    assert not up.judged
    assert loop.said[1][0] - loop.said[0][0] == 100
    assert loop.trim == 1.0


def test_two_skips_far_apart_do_not() -> None:
    assert Loop().run([*noise(200), SPIKE, *noise(60), SPIKE, *noise(200)]).said == []


def test_where_single_skips_are_usual_two_in_a_window_are_no_trouble_and_five_are() -> None:
    def spiked(at: Iterable[int], n: int, seed: int) -> list[tuple[float, float]]:
        out = noise(n, seed)
        for i in at:
            out[i] = (9.0, 1.0)
        return out

    usual = spiked(range(99, 1400, 100), 1450, 5)  # one in a hundred: half a skip per window
    assert poisson_tail(2, 0.5) > 0.09
    assert poisson_tail(4, 0.5) > 1e-3 > poisson_tail(5, 0.5)
    loop = Loop().run(noise(200)).run(usual)
    assert loop.admitted.count(False) == 14
    assert loop.state["budget"]["strays"] >= 8
    assert loop.run(spiked((10, 30), 100, 6)).reasons == []
    assert loop.run(spiked((10, 18, 26, 34, 42), 50, 7)).reasons == ["guard_back_off"]
    assert Loop().run(noise(200)).run(spiked((10, 30), 50, 6)).reasons == ["guard_back_off"]  # the control


def test_what_was_not_carried_out_is_not_taken_back() -> None:
    class Advised(Loop):
        def carry_out(self, p: Proposal) -> None:
            pass

    assert Advised().run([*noise(200), SPIKE, SPIKE, *noise(300)]).reasons == ["guard_back_off"]


def test_a_return_that_the_arbiter_cuts_is_proposed_until_it_is_done() -> None:
    class Cut(Loop):
        def carry_out(self, p: Proposal) -> None:
            self.trim *= min(p.factor, 1.5)

    loop = Cut().run([*noise(200), SPIKE, SPIKE, *noise(600)])
    assert loop.reasons == ["guard_back_off", "guard_rewarm", "guard_rewarm"]
    assert loop.trim == pytest.approx(1.0, abs=1e-12)


def test_again_while_backed_off_rolls_back_and_lowers_the_rates() -> None:
    loop = Loop().run(noise(200))
    loop.save()
    loop.run([*noise(95, seed=1), SPIKE, SPIKE, *noise(30), SPIKE, SPIKE, *noise(150, seed=2)])
    assert loop.reasons == ["guard_back_off", "guard_rollback_spikes", "guard_after_rollback"]
    _, back = loop.said[1]
    assert back.kind == "rollback"
    assert back.needs == ("snapshot",)
    assert (back.evidence["first"], back.evidence["last"]) == (295.0, loop.said[1][0] - 4)
    assert loop.trim == pytest.approx(0.7)  # the back-off went with the rollback


def climb(*, keeps_budget: bool) -> Loop:
    """The same bad data after every rollback."""
    loop = Loop(keeps_budget=keeps_budget).run(noise(200))
    loop.save()
    for _ in range(12):
        loop.run([*noise(40, seed=3), SPIKE, SPIKE, *noise(8), SPIKE, SPIKE, *noise(8)])
    return loop


def test_the_same_spike_after_a_rollback_meets_the_next_rung() -> None:
    rungs = [r for r in climb(keeps_budget=True).reasons if r != "guard_after_rollback"]
    assert rungs == ["guard_back_off", "guard_rollback_spikes", "guard_rollback_spikes", "guard_stop_spikes"]


def test_with_a_restored_budget_it_would_go_round_for_ever() -> None:
    """The control: what keeping the budget is for."""
    reasons = climb(keeps_budget=False).reasons
    assert reasons.count("guard_rollback_spikes") > 3
    assert "guard_stop_spikes" not in reasons


def test_a_nan_burst() -> None:
    """Three: left out. Endless: back off, roll back, stop; and never an update with NaN, nor NaN in the state."""
    assert Loop().run([*noise(200), NAN, *noise(100)]).said == []
    loop = Loop().run([*noise(200), *[NAN] * 100])
    assert loop.reasons == [
        "guard_back_off", "guard_rollback_spikes", "guard_rollback_spikes", "guard_stop_spikes",
    ]  # fmt: skip
    assert not any(loop.admitted[200:])
    json.dumps(loop.state, allow_nan=False)


def test_a_burst_that_nobody_read_does_not_make_the_ladder_numb() -> None:
    """No readings during 300 NaN: their number is no rate of single skips, and the next pair is still answered."""
    loop = Loop().run(noise(200))
    for _ in range(300):
        _, _, loop.state = loop.policy.admit(loop.state, loop.step, *NAN)
    assert loop.state["budget"]["strays"] == 0
    assert loop.run(noise(10)).reasons == ["guard_back_off"]


def test_one_nan_then_normal_is_as_if_it_had_not_been() -> None:
    with_nan = Loop().run([*noise(150), NAN, *noise(150, seed=1)]).state
    without = Loop().run([*noise(150), *noise(150, seed=1)]).state
    assert [with_nan[k] for k in ("losses", "norms", "refused")] == [without[k] for k in ("losses", "norms", "refused")]


def test_a_change_of_level_is_not_left_out_for_ever() -> None:
    loop = Loop().run([*noise(200), *noise(600, level=4.0)])
    refused = [i for i, good in enumerate(loop.admitted) if not good]
    assert len(refused) == 16
    assert refused[-1] == 215
    assert loop.reasons[0] == "guard_back_off"
    stuck = Loop(GuardPolicy(patience=50, skips=50, window=50)).run([*noise(200), *noise(40, level=4.0)])
    assert not any(stuck.admitted[200:])  # the control: without patience it would be


def test_a_level_that_stays_higher_while_backed_off_rolls_back() -> None:
    """Spikes that lead to a worse level than before, though each single loss is admitted by then."""
    loop = Loop(GuardPolicy(hold=200)).run(noise(200))
    loop.save()
    loop.run([SPIKE, SPIKE, *noise(90, level=2.2, seed=1)])
    assert loop.reasons == ["guard_back_off", "guard_rollback_persistent", "guard_after_rollback"]
    fine = Loop(GuardPolicy(hold=200)).run([*noise(200), SPIKE, SPIKE, *noise(100, seed=1)])
    assert fine.reasons == ["guard_back_off"]


def test_an_announced_change_is_no_trouble() -> None:
    loop = Loop().run(noise(200))
    loop.events.append("data")
    loop.read()
    loop.run(noise(300, level=4.0, seed=1))
    assert all(loop.admitted)
    assert loop.said == []


def test_all_is_forgiven_after_calm() -> None:
    bad = [SPIKE, SPIKE]
    loop = Loop(GuardPolicy(calm=500)).run(
        [*noise(200), *bad, *noise(20), *bad, *noise(1000, seed=1), *bad, *noise(20)]
    )
    assert loop.reasons == ["guard_back_off", "guard_rollback_spikes", "guard_rewarm", "guard_back_off"]


def test_counts_stand_in_where_nothing_asks() -> None:
    policy = GuardPolicy()
    state, said = policy.init(), []
    for i in range(4):
        counts = {"updates": 8, "skipped": 2} if i == 2 else {"updates": 10}
        proposals, state = policy.step(Reading(clock=Clock(step=10 * i), counts=counts), state)
        said += [p.reason for p in proposals]
    assert said == ["guard_back_off"]


def test_without_trims_in_the_readings_the_act_itself_is_the_sign() -> None:
    class Blind(Loop):
        def read(self, **more: Any) -> None:
            seen = Reading(clock=Clock(step=self.step), events=tuple(self.events))
            self.events = []
            proposals, self.state = self.policy.step(seen, self.state)
            for p in proposals:
                self.said.append((self.tried, p))
                self.carry_out(p)

    loop = Blind().run([*noise(200), SPIKE, SPIKE, *noise(1000, seed=1)])
    assert loop.reasons == ["guard_back_off", "guard_rewarm"]
    assert loop.trim == 1.0


def test_the_state_is_not_changed_in_place_and_300_is_150_and_150() -> None:
    values = [*noise(140), SPIKE, SPIKE, *noise(60, seed=1), SPIKE, NAN, *noise(96, seed=2)]
    whole = Loop().run(values)
    half = Loop().run(values[:150])
    text = json.dumps(half.state, allow_nan=False)
    policy, step = half.policy, half.step
    policy.admit(half.state, step, *SPIKE)
    policy.step(Reading(clock=Clock(step=step), events=("rollback", "data")), half.state)
    assert json.dumps(half.state, allow_nan=False) == text
    half.state = json.loads(text)
    half.run(values[150:])
    assert half.state == whole.state
    assert half.said == whole.said
    assert half.said


QUIET = {
    # name: (noise in deviations, most false skips per update that are stated in docs/guards.md)
    "normal": (lambda rng, n: rng.normal(size=n), 1e-4),
    "student10": (lambda rng, n: rng.standard_t(10, size=n), 2e-4),
    "student5": (lambda rng, n: rng.standard_t(5, size=n), 2e-3),
}


@pytest.mark.parametrize(
    ("kind", "n"), [("normal", 20_000), *(pytest.param(k, 100_000, marks=pytest.mark.slow) for k in QUIET)]
)
def test_a_quiet_run(kind: str, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw, most = QUIET[kind]
    rng = np.random.default_rng(7)
    losses, norms = 2.0 + 0.05 * draw(rng, n), np.exp(0.2 * draw(rng, n))
    loop = Loop().run(zip(losses.tolist(), norms.tolist(), strict=True))
    skips = loop.admitted.count(False)
    with capsys.disabled():
        print(f"\n{kind}: {skips} false skips in {n} updates; {loop.reasons}")
    assert skips <= most * n
    assert not any(p.kind in ("rollback", "stop") for _, p in loop.said)
    assert loop.trim == 1.0 or loop.reasons[-1] == "guard_back_off"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "guard k=0: legal is a positive number"),
        ({"known": 200}, "guard known=200: legal is 8 to ring=128"),
        ({"backoff": 1.5}, "guard backoff=1.5: legal is a factor in"),
        ({"patience": 60}, "guard patience=60: legal is at most window=50"),
        ({"skips": 17}, "guard skips=17: legal is 1 to patience=16"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GuardPolicy(**options)


def test_a_negative_norm_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"grad_norm=-1\.0"):
        GuardPolicy().admit(GuardPolicy().init(), 0, 1.0, -1.0)


@pytest.mark.parametrize(("steps", "held"), [(300, 9), (100_000, 100), (0, 100)])
def test_a_back_off_takes_no_more_than_its_share_of_a_run(steps: int, held: int) -> None:
    policy = GuardPolicy()
    state, said = policy.init(), []
    values = [*noise(100), SPIKE, SPIKE, *noise(250, seed=1)]
    trim, acted = 1.0, False
    for i, (loss, norm) in enumerate(values, start=1):
        _, _, state = policy.admit(state, i, loss, norm)
        events = ("acted:guard",) if acted else ()
        made, state = policy.step(
            Reading(clock=Clock(step=i), values={"trim.guard.all": trim}, events=events, steps=steps), state
        )
        acted = bool(made)
        for proposal in made:
            said.append((i, proposal))
            trim *= proposal.factor
    assert [p.reason for _, p in said] == ["guard_back_off", "guard_rewarm"]
    assert said[1][0] - said[0][0] == held
    assert said[1][1].ramp == held
