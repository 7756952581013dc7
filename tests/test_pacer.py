"""The Pacer against the contract that trainers rely on, one claim a test; real optimizers, no stand-ins."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import mupace
from mupace import ConfigError, Horizon, MupaceWarning, Pacer, StateError

torch.set_num_threads(1)

TEXT = "warmup 20% | hold 40% | sqrt 40% -> 0"
CURVE = mupace.schedule(TEXT, total="20 steps", tokens_per_step=100)


def parameters(n: int = 1, seed: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3)) for _ in range(n)]


def sgd(lr: Any = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters(), lr=lr, **options)


def update(optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """One update with gradients that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def advance(pacer: Pacer, updates: int) -> list[float]:
    """Run updates; returns the first group's rate as the optimizer had it at each."""
    seen = []
    for _ in range(updates):
        seen.append(float(pacer.optimizer.param_groups[0]["lr"]))
        for optimizer in pacer.optimizers:
            update(optimizer, pacer.last_epoch)
        pacer.step()
    return seen


def test_every_update_gets_the_curve_at_its_midpoint() -> None:
    assert advance(Pacer(sgd(), CURVE), 25) == [0.1 * f for f in CURVE.updates(0, 25)]


def test_a_negative_control_of_that_comparison() -> None:
    other = mupace.schedule("warmup 25% | hold 35% | sqrt 40% -> 0", total="20 steps")
    assert advance(Pacer(sgd(), CURVE), 25) != [0.1 * f for f in other.updates(0, 25)]


class TestSurface:
    """What trainers look at."""

    def test_it_is_a_scheduler_and_not_what_some_trainers_take_for_something_else(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        assert isinstance(pacer, LRScheduler)
        for poison in ("total_steps", "__call__", "__len__", "__bool__"):
            assert not hasattr(pacer, poison)
        assert bool(pacer)
        assert type(pacer).__name__ not in (
            "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "LRRangeTest", "DummyScheduler",
        )  # fmt: skip

    def test_the_attributes_that_containers_read_and_write(self) -> None:
        optimizer = sgd()
        pacer = Pacer(optimizer, CURVE)
        assert pacer.optimizer is optimizer
        assert (pacer.base_lrs, pacer.last_epoch, pacer._step_count) == ([0.1], 0, 1)
        assert (pacer._is_initial, pacer._get_lr_called_within_step) == (False, False)
        assert pacer._last_lr == pacer.get_last_lr() == pacer.get_lr()
        pacer._step_count += 3
        pacer.last_epoch = 7
        pacer._last_lr = pacer.get_lr()
        assert (pacer.last_epoch, pacer.clock.step) == (7, 7)
        assert optimizer.param_groups[0]["lr"] == 0.1 * CURVE.updates(7, 8)[0]

    def test_get_lr_is_pure_and_says_nothing(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = pacer.get_lr()
            first[0] = 99.0
            assert pacer.get_lr() == pacer.get_last_lr() != first
        assert pacer.last_epoch == 0

    @pytest.mark.parametrize("argument", [5, 0.25, torch.tensor(1.0), "x"])
    def test_a_positional_argument_of_step_never_moves_the_clock(self, argument: object) -> None:
        pacer = Pacer(sgd(), CURVE)
        pacer.step(argument)
        assert pacer.last_epoch == 0
        update(pacer.optimizer)
        pacer.step(argument)
        assert pacer.last_epoch == 1

    def test_no_key_joins_the_groups_after_construction(self) -> None:
        optimizer = torch.optim.AdamW(parameters(), lr=0.1)
        pacer = Pacer(optimizer, CURVE, fields={"weight_decay": "linear -> 0.5"})
        keys = set(optimizer.param_groups[0])
        advance(pacer, 3)
        state, pacer_state = optimizer.state_dict(), pacer.state_dict()
        optimizer.load_state_dict(state)
        pacer.load_state_dict(pacer_state)
        pacer.set_peak(0.2)
        assert set(optimizer.param_groups[0]) == keys


class TestState:
    def test_it_goes_through_weights_only_torch_load_and_json(self) -> None:
        pacer = Pacer(sgd(), CURVE, fields={"momentum": "hold"})
        advance(pacer, 5)
        pacer.extend("30 steps")
        file = io.BytesIO()
        torch.save(pacer.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == pacer.state_dict()
        assert json.loads(json.dumps(pacer.state_dict(), allow_nan=False)) == pacer.state_dict()

    def test_it_stays_small(self) -> None:
        groups = [{"params": [p], "name": f"g{i}"} for i, p in enumerate(parameters(10))]
        pacer = Pacer(torch.optim.SGD(groups, lr=0.1), CURVE)
        before = len(json.dumps(pacer.state_dict()))
        advance(pacer, 15)
        assert len(json.dumps(pacer.state_dict())) < before + 10 < 4000

    def test_loading_twice_is_loading_once(self) -> None:
        source, target = Pacer(sgd(), CURVE), Pacer(sgd(), CURVE)
        advance(source, 6)
        for _ in range(2):
            target.load_state_dict(source.state_dict())
            assert target.state_dict() == source.state_dict()
            assert target.optimizer.param_groups[0]["lr"] == source.optimizer.param_groups[0]["lr"]

    def test_a_foreign_state_moves_the_clock_and_nothing_else(self) -> None:
        foreign = LambdaLR(sgd(), lambda n: 1.0)
        for _ in range(4):
            foreign.optimizer.step()
            foreign.step()
        pacer = Pacer(sgd(), CURVE)
        pacer.load_state_dict(foreign.state_dict())
        assert pacer.last_epoch == 4
        assert pacer.optimizer.param_groups[0]["lr"] == 0.1 * CURVE.updates(4, 5)[0]

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ({}, r"keys \[\]: legal is what state_dict\(\) gave"),
            ({"format": 99}, "format=99"),
            ({"format": 1, "last_epoch": 3, "pacer": "{"}, "cannot be read"),
            ({"format": 1, "last_epoch": 3}, "cannot be read"),
        ],
    )
    def test_what_is_no_state_is_refused(self, state: dict[str, Any], words: str) -> None:
        with pytest.raises(StateError, match=words):
            Pacer(sgd(), CURVE).load_state_dict(state)

    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
    @pytest.mark.parametrize(
        "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_paces_the_copied_optimizer(self, way: Callable[[Pacer], Pacer], lr: Any) -> None:
        pacer = Pacer(sgd(lr), CURVE)
        advance(pacer, 3)
        twin = way(pacer)
        assert twin.optimizer is not pacer.optimizer
        assert advance(twin, 5) == [pytest.approx(0.1 * f) for f in CURVE.updates(3, 8)]
        assert (twin.last_epoch, pacer.last_epoch) == (8, 3)
        assert float(pacer.optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * CURVE.updates(3, 4)[0])
        state = twin.optimizer.state_dict()
        state["param_groups"][0]["lr"] = 77.0
        twin.optimizer.load_state_dict(state)  # the load hook is there too
        assert float(twin.optimizer.param_groups[0]["lr"]) == pytest.approx(twin.get_last_lr()[0])


class TestLife:
    def test_nothing_keeps_the_pacer_or_the_optimizer_alive(self) -> None:
        gc.collect()
        gc.disable()
        try:
            optimizer = sgd()
            pacer = Pacer(optimizer, CURVE)
            advance(pacer, 2)
            pacer_gone, optimizer_gone = weakref.ref(pacer), weakref.ref(optimizer)
            hooks = (optimizer._optimizer_step_post_hooks, optimizer._optimizer_load_state_dict_post_hooks)
            assert [len(h) for h in hooks] == [1, 1]
            del pacer
            assert pacer_gone() is None
            assert [len(h) for h in hooks] == [0, 0]
            del optimizer
            assert optimizer_gone() is None
        finally:
            gc.enable()

    def test_an_optimizer_outlives_its_pacer(self) -> None:
        optimizer = sgd()
        Pacer(optimizer, CURVE)
        optimizer.load_state_dict(optimizer.state_dict())
        update(optimizer)

    def test_a_replaced_step_is_no_obstacle(self) -> None:
        optimizer = sgd()
        inner = optimizer.step
        optimizer.step = lambda *a, **k: inner(*a, **k)  # type: ignore[method-assign]
        pacer = Pacer(optimizer, CURVE)
        advance(pacer, 3)
        assert pacer.last_epoch == 3


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


class TestTensorRates:
    def test_groups_that_share_a_default_get_values_of_their_own(self) -> None:
        default = torch.tensor(0.1)
        groups = [{"params": [p]} for p in parameters(3)]
        groups[1]["lr"] = torch.tensor(0.2)  # type: ignore[assignment]
        groups[2]["floor"] = 0.5  # type: ignore[assignment]
        optimizer = torch.optim.SGD(groups, lr=default)
        pacer = Pacer(optimizer, CURVE)
        held = [g["lr"] for g in optimizer.param_groups]
        pacer.seek(step=19)
        assert [float(x) for x in held] == pytest.approx(pacer.get_last_lr())
        assert len({float(x) for x in held}) == 3
        assert float(default) == pytest.approx(0.1)
        optimizer.add_param_group({"params": parameters(1, seed=5)})  # takes the default: the peak, not today's rate
        update(optimizer)
        pacer.step()
        assert pacer.base_lrs == pytest.approx([0.1, 0.2, 0.1, 0.1])
        assert all(g["lr"] is x for g, x in zip(optimizer.param_groups, held, strict=False))

    def test_floats_and_tensors_of_two_kinds_side_by_side(self) -> None:
        lrs = [0.1, torch.tensor(0.2), torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.4)]
        optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters(4), lrs, strict=True)])
        pacer = Pacer(optimizer, CURVE)
        advance(pacer, 9)
        now = [g["lr"] for g in optimizer.param_groups]
        assert [getattr(x, "dtype", float) for x in now] == [float, torch.float32, torch.float64, torch.float32]
        assert [float(x) for x in now] == pytest.approx(pacer.get_last_lr())
        assert float(now[2]) == pacer.get_last_lr()[2]


class TestGroups:
    def test_own_schedule_floor_unfreeze_and_rewarm(self) -> None:
        a, b, c, d = parameters(4)
        optimizer = torch.optim.SGD(
            [
                {"params": [a], "name": "main"},
                {"params": [b], "name": "own", "schedule": "linear -> 0", "lr": 0.4},
                {"params": [c], "name": "floored", "floor": 0.25},
                {"params": [d], "name": "late", "unfreeze": "5 steps", "rewarm": "4 steps"},
            ],
            lr=0.1,
        )
        pacer = Pacer(optimizer, CURVE)
        rows = []
        for _ in range(20):
            rows.append([g["lr"] for g in optimizer.param_groups])
            update(optimizer)
            pacer.step()
        main, own, floored, late = np.array(rows).T
        f = CURVE.updates()
        np.testing.assert_array_equal(main, 0.1 * f)
        np.testing.assert_allclose(own, 0.4 * (1 - (np.arange(20) + 0.5) / 20), rtol=1e-14)
        np.testing.assert_allclose(floored[4:], 0.1 * (0.25 + 0.75 * f[4:]), rtol=1e-14)
        np.testing.assert_allclose(late, 0.1 * f * np.clip((np.arange(20) + 0.5 - 5) / 4, 0, 1), rtol=1e-14)
        assert pacer.names == ["main", "own", "floored", "late"]

    def test_a_group_without_a_rate_change_and_a_peak_of_zero(self) -> None:
        a, b = parameters(2)
        optimizer = torch.optim.SGD(
            [{"params": [a], "schedule": "hold", "lr": 0.3}, {"params": [b], "lr": 0.0}], lr=0.1
        )
        pacer = Pacer(optimizer, CURVE)
        advance(pacer, 30)
        assert pacer.get_last_lr() == [0.3, 0.0]
        pacer.set_peak(0.6)
        assert pacer.get_last_lr() == [0.6, 0.0]

    def test_a_group_added_through_the_pacer_rises_from_now(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        advance(pacer, 6)
        pacer.add_param_group({"params": parameters(1, seed=3), "lr": 0.2, "name": "new", "rewarm": "2 steps"})
        rates = []
        for _ in range(3):
            rates.append(pacer.get_last_lr()[1])
            advance(pacer, 1)
        assert rates == pytest.approx([0.05, 0.15, 0.2])  # the main curve holds at 1 here
        assert pacer.optimizer.param_groups[1]["initial_lr"] == 0.2

    def test_a_group_added_through_the_optimizer_is_paced_from_the_next_update(self) -> None:
        first, second = sgd(0.1), sgd(0.5)
        pacer = Pacer([first, second], CURVE)
        advance(pacer, 2)
        first.add_param_group({"params": parameters(1, seed=3), "lr": 0.2})  # not the last optimizer: places shift
        advance(pacer, 1)
        f = CURVE.updates(3, 4)[0]
        assert first.param_groups[0]["lr"] == 0.1 * f
        assert first.param_groups[1]["lr"] == 0.2 * f
        assert second.param_groups[0]["lr"] == 0.5 * f
        assert pacer.get_last_lr() == [0.1 * f, 0.5 * f, 0.2 * f]

    def test_what_cannot_be_a_group_leaves_the_optimizer_as_it_was(self) -> None:
        pacer = Pacer(sgd(), CURVE)
        for bad, words in (
            ({"rewarm": "30 steps"}, "group 'x': it is not open before the end"),
            ({"schedule": "cosin"}, "group 'x': .*did you mean"),
            ({"unfreeze": 5}, "group 'x': unfreeze=5 has no unit"),
            ({"floor": "a"}, "group 'x': floor='a'"),
            ({"lr": -1.0}, "group 'x': lr=-1.0"),
            ({"lr": None}, "group 'x': lr=None"),
            ({"lr": float("nan")}, "group 'x': lr=nan"),
        ):
            with pytest.raises(ConfigError, match=words) as caught:
                pacer.add_param_group({"params": parameters(), "name": "x", **bad})
            assert "\n" not in str(caught.value)
        with pytest.raises(ConfigError, match="optimizer=1; legal is 0 to 0"):
            pacer.add_param_group({"params": parameters()}, optimizer=1)
        assert len(pacer.optimizer.param_groups) == len(pacer.groups) == 1
        advance(pacer, 1)

    def test_removed_groups_are_refused(self) -> None:
        pacer = Pacer(torch.optim.SGD([{"params": [p]} for p in parameters(2)], lr=0.1), CURVE)
        del pacer.optimizer.param_groups[1]
        update(pacer.optimizer)
        with pytest.raises(StateError, match="the optimizer has 1 groups, it had 2"):
            pacer.step()

    def test_a_recorded_base_that_disagrees_is_named(self) -> None:
        optimizer = sgd()
        LambdaLR(optimizer, lambda n: 0.25)
        with pytest.warns(MupaceWarning, match="group 'group0': initial_lr=0.1, .* not lr=0.025") as caught:
            pacer = Pacer(optimizer, CURVE)
        assert caught[0].filename == __file__
        assert pacer.base_lrs == [0.1]

    def test_two_optimizers_on_one_clock(self) -> None:
        torch.manual_seed(0)
        w, b = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
        muon = torch.optim.Muon([w], lr=0.02, momentum=0.95, weight_decay=0.0)
        adamw = torch.optim.AdamW([b], lr=3e-4)
        pacer = Pacer([muon, adamw], CURVE, fields={"momentum": "hold 50% | linear -> 0.9"})
        for _ in range(15):
            for optimizer in (muon, adamw):
                update(optimizer)
            pacer.step()
        f, m = CURVE.updates(15, 16)[0], 1 - 0.1 * (15.5 - 10) / 10
        assert pacer.last_epoch == 15
        assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02 * f, 3e-4 * f)
        assert muon.param_groups[0]["momentum"] == pytest.approx(0.95 * m)
        assert adamw.param_groups[0]["betas"] == (pytest.approx(0.9 * m), 0.999)

    def test_one_of_two_optimizers_that_overflowed_does_not_stop_the_clock(self) -> None:
        first, second = sgd(), sgd()
        pacer = Pacer([first, second], CURVE)
        update(second)
        pacer.step()
        assert pacer.last_epoch == 1


class TestFields:
    @pytest.mark.parametrize(
        ("field", "options", "read"),
        [
            ("momentum", {"momentum": 0.8}, lambda g: g["momentum"]),
            ("weight_decay", {"weight_decay": 0.1}, lambda g: g["weight_decay"]),
        ],
    )
    def test_of_sgd(self, field: str, options: dict[str, float], read: Callable[[Any], float]) -> None:
        pacer = Pacer(sgd(**options), CURVE, fields={field: "linear -> 0.5"})
        for i in range(5):
            assert read(pacer.optimizer.param_groups[0]) == pytest.approx(options[field] * (1 - 0.5 * (i + 0.5) / 20))
            advance(pacer, 1)

    @pytest.mark.parametrize(
        ("field", "base", "read"),
        [
            ("beta1", 0.9, lambda g: g["betas"][0]),
            ("momentum", 0.9, lambda g: g["betas"][0]),
            ("beta2", 0.999, lambda g: g["betas"][1]),
            ("eps", 1e-8, lambda g: g["eps"]),
            ("weight_decay", 0.01, lambda g: g["weight_decay"]),
        ],
    )
    def test_of_adamw(self, field: str, base: float, read: Callable[[Any], float]) -> None:
        pacer = Pacer(torch.optim.AdamW(parameters(), lr=0.1), CURVE, fields={field: "linear -> 0.5"})
        advance(pacer, 4)
        assert read(pacer.optimizer.param_groups[0]) == pytest.approx(base * (1 - 0.5 * 4.5 / 20))

    def test_tensor_fields_keep_their_identity_and_are_not_shared(self) -> None:
        betas = (torch.tensor(0.9), torch.tensor(0.99))
        groups = [{"params": [p]} for p in parameters(2)]
        optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.1), betas=betas, capturable=False, foreach=False)
        pacer = Pacer(optimizer, CURVE, fields={"beta1": "linear -> 0.5"})
        held = [g["betas"][0] for g in optimizer.param_groups]
        assert held[0] is not held[1] is not betas[0]
        pacer.seek(step=9)
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert [g["betas"][0] is h for g, h in zip(optimizer.param_groups, held, strict=True)] == [True, True]
        assert float(held[0]) == pytest.approx(0.9 * (1 - 0.5 * 9.5 / 20))
        assert float(betas[0]) == pytest.approx(0.9)

    @pytest.mark.parametrize("name", ["weight_dcay", "params", "nesterov", "initial_lr", "foreach"])
    def test_an_unknown_field_is_refused_with_the_legal_ones(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"fields='{name}' is not known.*momentum, weight_decay$"):
            Pacer(sgd(), CURVE, fields={name: "hold"})

    def test_lr_is_not_a_field_and_a_bad_text_names_its_field(self) -> None:
        with pytest.raises(ConfigError, match="fields: 'lr' follows `curve`"):
            Pacer(sgd(), CURVE, fields={"lr": "hold"})
        with pytest.raises(ConfigError, match=r"fields: 'momentum': .*did you mean"):
            Pacer(sgd(), CURVE, fields={"momentum": "hld 10% | hold"})


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
        with pytest.raises(ConfigError, match="step: tokens="):
            pacer.step(tokens=bad)

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

    @pytest.mark.parametrize("call", [{}, {"step": 1, "tokens": 1}, {"step": -1}, {"step": 1.5}, {"step": True}])
    def test_what_is_no_position(self, call: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="seek: "):
            Pacer(sgd(), CURVE).seek(**call)


class TestClipping:
    def test_over_all_groups_and_optimizers(self) -> None:
        a, b = parameters(2)
        pacer = Pacer([torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)], CURVE)
        a.grad, b.grad = torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 4, 0])
        assert float(pacer.clip_grad_norm_(1.0)) == pytest.approx(5)
        assert pacer.last_grad_norm is not None
        assert float(a.grad[0]) == pytest.approx(0.6)
        assert float(b.grad[1]) == pytest.approx(0.8)
        pacer.clip_grad_value_(0.5)
        assert float(a.grad.max()) == float(b.grad.max()) == 0.5
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError):
                pacer.clip_grad_norm_(bad)
            with pytest.raises(ConfigError):
                pacer.clip_grad_value_(bad)


class TestArguments:
    def test_one_line_errors(self) -> None:
        one = sgd()
        for call, words in (
            (lambda: Pacer(one, "cosine"), "curve='cosine': legal is a curve"),
            (lambda: Pacer(torch.nn.Linear(1, 1), CURVE), "optimizer=Linear: legal is a torch.optim.Optimizer"),
            (lambda: Pacer([], CURVE), r"optimizer=\[\]"),
            (lambda: Pacer([one, one], CURVE), "the same one is given twice"),
            (lambda: Pacer(one, CURVE, on_mismatch="eror"), "on_mismatch='eror' is not known .did you mean 'error'"),
        ):
            with pytest.raises(ConfigError, match=words) as caught:
                call()  # type: ignore[no-untyped-call]
            assert "\n" not in str(caught.value)

    def test_a_refused_construction_leaves_no_hook(self) -> None:
        optimizer = sgd()
        with pytest.raises(ConfigError):
            Pacer(optimizer, CURVE, fields={"nothing": "hold"})
        assert not optimizer._optimizer_step_post_hooks

    def test_a_horizon_in_epochs(self) -> None:
        h = Horizon(total="2 epochs", steps_per_epoch=10)  # type: ignore[arg-type]
        pacer = Pacer(sgd(), mupace.schedule("linear -> 0", total=h))
        advance(pacer, 10)
        assert pacer.get_last_lr() == [pytest.approx(0.1 * (1 - 10.5 / 20))]


def test_check_ranks_is_free_in_one_process() -> None:
    pacer = Pacer(sgd(), CURVE)
    pacer.optimizer.param_groups[0]["lr"] = 5.0
    pacer.check_ranks()


@pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning")
def test_a_distributed_checkpoint_holds_it_whatever_the_fresh_object_lacks(tmp_path: Any) -> None:
    pacer = Pacer(sgd(), CURVE)
    advance(pacer, 5)
    pacer.extend("30 steps", reason="more data")
    advance(pacer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations in saving
        dcp.save({"pacer": pacer}, checkpoint_id=tmp_path)
        fresh = Pacer(sgd(), CURVE)
        dcp.load({"pacer": fresh}, checkpoint_id=tmp_path)
    assert fresh.state_dict() == pacer.state_dict()
    assert fresh.get_last_lr() == pacer.get_last_lr()
