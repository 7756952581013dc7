"""When the Pacer advances, and by how much: applied updates, compiled steps, measured clocks, seeking."""

from __future__ import annotations

import copy
import json
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import mupace
from mupace import ConfigError, MupaceWarning, Pacer
from pacing import CURVE, TEXT, advance, parameters, sgd, update

torch.set_num_threads(1)


def compiled_run(kind: str, lr: Any, updates: int = 8) -> tuple[Pacer, int]:
    """A run whose optimizer step is compiled; returns the pacer and the number of graphs made."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    optimizer = torch.optim.AdamW(parameters(), lr=lr)
    if kind == "before":
        optimizer.step = torch.compile(optimizer.step, backend=counter)  # type: ignore[method-assign]
    pacer = Pacer(optimizer, CURVE)
    step = optimizer.step
    if kind == "lambda":
        step = torch.compile(lambda: optimizer.step(), backend=counter)
    elif kind == "after":
        step = torch.compile(optimizer.step, backend=counter)
    for _ in range(updates):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        step()
        pacer.step()
    return pacer, counter.frame_count


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # the compiler's own import
class TestCompile:
    @pytest.mark.parametrize("kind", ["before", "after", "lambda"])
    def test_a_tensor_rate_is_compiled_once(self, kind: str) -> None:
        pacer, graphs = compiled_run(kind, torch.tensor(0.1))
        assert (pacer.last_epoch, graphs) == (8, 1)

    @pytest.mark.parametrize("kind", ["before", "after", "lambda"])
    def test_a_float_rate_costs_one_more_graph(self, kind: str) -> None:
        pacer, graphs = compiled_run(kind, 0.1)
        assert (pacer.last_epoch, graphs) == (8, 2)

    def test_a_load_between_compiled_steps_makes_no_new_graph(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        optimizer = torch.optim.AdamW(parameters(), lr=torch.tensor(0.1))
        pacer = Pacer(optimizer, CURVE)
        step = torch.compile(optimizer.step, backend=counter)
        for i in range(6):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            step()
            pacer.step()
            if i == 2:
                state, held = optimizer.state_dict(), optimizer.param_groups[0]["lr"]
                state["param_groups"][0]["lr"] = 0.5
                optimizer.load_state_dict(state)
                assert optimizer.param_groups[0]["lr"] is held
        assert pacer.last_epoch == 6
        assert counter.frame_count == 1

    def test_the_compiler_does_not_trace_the_pacer(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        optimizer = sgd(torch.tensor(0.1))
        pacer = Pacer(optimizer, CURVE)

        @torch.compile(backend=counter)
        def region(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            pacer.step()
            return y + 1

        for _ in range(8):
            update(optimizer)
            region(torch.ones(3))
        assert pacer.last_epoch == 8
        assert (counter.frame_count, counter.op_count) == (2, 2)  # x * 2 and y + 1, nothing of the pacer


class TestAppliedUpdates:
    """It advances once per update that was applied."""

    def test_micro_batches(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        rates = []
        for i in range(24):
            if i % 4 == 3:
                rates.append(pacer.optimizer.param_groups[0]["lr"])
                update(pacer.optimizer)
            pacer.step()
        assert pacer.last_epoch == 6
        assert rates == [0.1 * f for f in CURVE.updates(0, 6)]

    def test_extra_calls(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        for _ in range(5):
            update(pacer.optimizer)
            for _ in range(4):
                pacer.step()
        assert pacer.last_epoch == 5

    def test_the_wrong_order_of_calls(self) -> None:
        pacer, rates = Pacer(sgd(), CURVE), []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                pacer.step()
                rates.append(pacer.optimizer.param_groups[0]["lr"])
                update(pacer.optimizer)
        assert rates == [0.1 * f for f in CURVE.updates(0, 6)]

    @pytest.mark.parametrize("unscale", [False, True])
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    def test_overflows(self, kind: Any, fused: bool, unscale: bool) -> None:
        (p,) = ps = parameters()
        optimizer = kind(ps, lr=0.1, fused=fused)
        pacer = Pacer(optimizer, CURVE)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        for i in range(10):
            before = p.detach().clone()
            p.grad = torch.full((3,), 2.0)
            if i in (0, 4, 5):
                p.grad[1] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            clock = pacer.last_epoch
            pacer.step()
            assert (pacer.last_epoch > clock) == (not torch.equal(p, before))
        assert pacer.last_epoch == 7

    @pytest.mark.parametrize("skipped", [(0, 1), (1, 0)])
    def test_two_steps_between_two_calls_of_which_one_was_skipped(self, skipped: tuple[int, int]) -> None:
        (p,) = ps = parameters()
        optimizer = torch.optim.SGD(ps, lr=0.1, fused=True)
        pacer = Pacer(optimizer, CURVE)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        for overflow in skipped:
            p.grad = torch.full((3,), float("inf") if overflow else 1.0)
            scaler.step(optimizer)
            scaler.update()
        pacer.step()
        assert pacer.last_epoch == 1

    def test_closures(self) -> None:
        (p,) = ps = parameters()
        optimizer = torch.optim.LBFGS(ps, lr=0.1, max_iter=5)
        pacer = Pacer(optimizer, CURVE)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            pacer.step()
        assert pacer.last_epoch == 3

    def test_a_closure_given_as_none_by_name(self) -> None:
        pacer = Pacer(sgd(), mupace.schedule("warmup 50% | hold", total="8 steps", sample="start"))
        for i in range(3):  # the rate of update 0 is 0
            pacer.optimizer.param_groups[0]["params"][0].grad = torch.full((3,), 1.0 + i)
            pacer.optimizer.step(closure=None)
            pacer.step()
        assert pacer.last_epoch == 3

    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    def test_the_rehearsal_step_of_distributed_checkpoints(self, kind: Any, lr: Any) -> None:
        model = torch.nn.Linear(3, 1)
        optimizer = kind(model.parameters(), lr=lr)
        pacer = Pacer(optimizer, CURVE)
        held = optimizer.param_groups[0]["lr"]
        for i in range(3):
            state = get_optimizer_state_dict(model, optimizer)  # makes a step where there is no state yet
            pacer.step()
            assert pacer.last_epoch == i
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            pacer.step()
        fresh = kind(model.parameters(), lr=lr)
        other = Pacer(fresh, CURVE)
        other.load_state_dict(pacer.state_dict())
        set_optimizer_state_dict(model, fresh, optim_state_dict=state)
        other.step()
        assert other.last_epoch == pacer.last_epoch == 3
        assert float(fresh.param_groups[0]["lr"]) == pytest.approx(0.1 * CURVE.updates(3, 4)[0])
        assert optimizer.param_groups[0]["lr"] is held or not isinstance(held, torch.Tensor)

    def test_an_explicit_answer_settles_what_was_seen(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        pacer.step(applied=True)
        update(pacer.optimizer)
        pacer.step(applied=False)
        assert pacer.last_epoch == 1
        pacer.step()
        assert pacer.last_epoch == 1

    def test_a_load_or_a_seek_forgets_steps_made_before(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        update(pacer.optimizer)  # a warm-up of a captured graph, say
        pacer.seek(step=0)
        pacer.step()
        update(pacer.optimizer)
        pacer.load_state_dict(pacer.state_dict())
        pacer.step()
        assert pacer.last_epoch == 0
        state = copy.deepcopy(pacer.optimizer.state_dict())
        update(pacer.optimizer)
        pacer.optimizer.load_state_dict(state)  # rolled back
        pacer.step()
        assert pacer.last_epoch == 0

    def test_it_says_so_when_nothing_moves_and_when_too_much_does(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        for _ in range(999):
            pacer.step()
        with pytest.warns(MupaceWarning, match="1000 times and no optimizer update has been seen") as caught:
            pacer.step()
        assert caught[0].filename == __file__
        for _ in range(100):
            update(pacer.optimizer)
        with pytest.warns(MupaceWarning, match="100 optimizer steps since the last pacer.step") as caught:
            pacer.step()
        assert caught[0].filename == __file__
        assert pacer.last_epoch == 1


class TestMeasuredClock:
    def test_uneven_batches_pace_by_what_was_consumed(self) -> None:
        curve = mupace.schedule("linear -> 0", total="2000 tokens", tokens_per_step=100)
        pacer, done, seen = Pacer(sgd(), curve), 0, []
        for size in (100, 100, 250, 50, 700, 300):
            seen.append(float(pacer.optimizer.param_groups[0]["lr"]))
            assert seen[-1] == pytest.approx(0.1 * (1 - (done + 50) / 2000))  # the middle of a planned next update
            update(pacer.optimizer)
            pacer.step(tokens=size)
            done += size
            assert pacer.clock.token == done
            assert pacer.used_lr() == [seen[-1]]
        assert pacer.clock.step == 6

    def test_even_batches_give_the_planned_rates_to_the_bit(self) -> None:
        curve = mupace.schedule(TEXT, total="2000 tokens", tokens_per_step=[("0 tokens", 50), ("600 tokens", 200)])
        planned, measured = Pacer(sgd(), curve), Pacer(sgd(), curve)
        for n in range(curve.steps + 3):
            assert measured.get_last_lr() == planned.get_last_lr()
            h = curve.horizon
            size = h.clock(n + 1).token - h.clock(n).token
            assert size == (50 if n < 12 else 200)
            update(planned.optimizer)
            planned.step()
            update(measured.optimizer)
            measured.step(tokens=size)
            assert measured.clock.token == planned.clock.token

    def test_a_ramp_is_looked_up_by_tokens_not_by_updates(self) -> None:
        curve = mupace.schedule(
            "linear -> 0", total="4000 tokens", tokens_per_step=[("0 tokens", 100), ("1000 tokens", 500)]
        )
        pacer = Pacer(sgd(), curve)
        update(pacer.optimizer)
        pacer.step(tokens=1000)  # after one update as far as after ten planned ones: the next will be of 500
        assert pacer.get_last_lr() == [pytest.approx(0.1 * (1 - 1250 / 4000))]

    def test_tensor_rates_and_samples(self) -> None:
        curve = mupace.schedule("linear -> 0", total="80 samples", samples_per_step=8)
        pacer = Pacer(sgd(torch.tensor(0.1)), curve)
        held = pacer.optimizer.param_groups[0]["lr"]
        update(pacer.optimizer)
        pacer.step(samples=20)
        assert pacer.optimizer.param_groups[0]["lr"] is held
        assert float(held) == pytest.approx(0.1 * (1 - 24 / 80))
        assert pacer.clock.sample == 20

    def test_counts_of_a_call_that_advances_nothing_are_ignored(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        pacer.step(tokens=17)
        assert (pacer.clock.step, pacer.clock.token, pacer._clock) == (0, 0, None)

    @pytest.mark.parametrize("bad", [-1, 1.5, True, "3"])
    def test_what_is_no_count_is_refused(self, bad: Any) -> None:
        pacer = Pacer(sgd(), CURVE)
        update(pacer.optimizer)
        before, rates = pacer.state_dict(), pacer.used_lr()
        for counts in ({"tokens": bad}, {"samples": bad}, {"tokens": 5, "samples": bad}):
            with pytest.raises(ConfigError, match=r"step: (tokens|samples)="):
                pacer.step(**counts)
            assert (pacer.state_dict(), pacer.used_lr()) == (before, rates)
        pacer.step(tokens=100)  # the update is still there to be counted
        assert (pacer.clock.step, pacer.clock.token) == (1, 100)

    def test_numpy_and_torch_counts(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        for count in (np.int64(30), torch.tensor(40)):
            update(pacer.optimizer)
            pacer.step(tokens=count)  # type: ignore[arg-type]
        assert pacer.clock.token == 70
        json.dumps(pacer.state_dict())

    def test_seconds(self) -> None:
        curve = mupace.schedule("linear -> 0", total="0.4 s")
        pacer = Pacer(sgd(), curve)
        assert pacer.get_last_lr() == [0.1]
        rates = []
        while pacer.clock.second < 0.4:
            time.sleep(0.05)
            update(pacer.optimizer)
            pacer.step()
            rates.append(pacer.get_last_lr()[0])
            assert rates[-1] == pytest.approx(0.1 * max(0.0, 1 - pacer.clock.second / 0.4))
        assert rates == sorted(rates, reverse=True)
        assert rates[0] < 0.09
        assert rates[-1] == 0
        again = Pacer(sgd(), curve)
        again.load_state_dict(json.loads(json.dumps(pacer.state_dict())))
        assert again.clock == pacer.clock

    def test_a_field_in_seconds_beside_a_curve_in_steps(self) -> None:
        own = mupace.schedule("linear -> 0", total="100 s")
        pacer = Pacer(sgd(weight_decay=1.0), CURVE, fields={"weight_decay": own})
        advance(pacer, 3)
        group = pacer.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(0.1 * CURVE.updates(3, 4)[0])
        assert group["weight_decay"] == pytest.approx(1 - pacer.clock.second / 100)
        assert 0 < pacer.clock.second < 50

    def test_a_token_plan_without_a_rate_says_what_is_missing(self) -> None:
        with pytest.raises(ConfigError, match="tokens_per_step"):
            Pacer(sgd(), mupace.schedule("linear -> 0", total="2000 tokens"))


class TestSeek:
    def test_there_and_back(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        for step in (0, 700, 3, 10**9, 1024, 1023, 512, 1, 0):
            pacer.seek(step=step)
            assert pacer.last_epoch == step
            assert pacer.get_last_lr() == [0.1 * CURVE.updates(step, step + 1)[0]]

    def test_tokens(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        pacer.seek(tokens=1230)
        assert pacer.clock == mupace.Clock(step=12, token=1200)
        update(pacer.optimizer)
        pacer.step(tokens=90)
        pacer.seek(tokens=555)  # a measured clock keeps the exact count
        assert (pacer.clock.step, pacer.clock.token) == (6, 555)

    def test_a_value_at_k_does_not_depend_on_how_k_was_reached(self) -> None:
        curve = mupace.schedule("warmup 3% | cosine 50% -> 0.2 | exp -> 0.01", total="2000 steps")
        walked = Pacer(sgd(), curve)
        for k in range(1100):
            if k % 37 == 0:
                sought = Pacer(sgd(), curve)
                sought.seek(step=k)
                assert sought.get_last_lr() == walked.get_last_lr()
            walked.step(applied=True)

    def test_to_where_it_is_moves_nothing(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        update(pacer.optimizer)
        pacer.step(tokens=37)
        before, rates = pacer.clock, pacer.get_last_lr()
        pacer.seek(step=1)
        assert (pacer.clock, pacer.get_last_lr()) == (before, rates)
        pacer.last_epoch = 1
        assert pacer.clock == before

    def test_on_a_plan_in_seconds_it_leaves_out_the_time_until_now(self) -> None:
        kept, left = (Pacer(sgd(), mupace.schedule("linear -> 0", total="60 s")) for _ in range(2))
        time.sleep(0.1)  # a data set is opened
        left.seek(step=0)
        for pacer in (left, kept):
            pacer.step(applied=True)
        assert kept.clock.second >= 0.1
        assert 0 < left.clock.second < kept.clock.second - 0.09
        here = left.clock.second
        left.seek(step=1)
        assert left.clock.second == here
        with pytest.raises(ConfigError, match=r"seek: step=9 on a plan in seconds: .* not known"):
            left.seek(step=9)
        assert left.last_epoch == 1
        known = Pacer(sgd(), mupace.schedule("linear -> 0", total="60 s", seconds_per_step=2.0))
        known.seek(step=9)
        assert known.clock.second == 18.0

    @pytest.mark.parametrize("call", [{}, {"step": 1, "tokens": 1}, {"step": -1}, {"step": 1.5}, {"step": True}])
    def test_what_is_no_position(self, call: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="seek: "):
            Pacer(sgd(), CURVE).seek(**call)
