"""The Pacer against the contract that trainers rely on, one claim a test; real optimizers, no stand-ins."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed.checkpoint as dcp
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import mupace
from mupace import ConfigError, Horizon, MupaceWarning, Pacer, StateError
from pacing import CURVE, advance, parameters, sgd, update

torch.set_num_threads(1)


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


class TestArguments:
    def test_one_line_errors(self) -> None:
        one = sgd()
        for call, words in (
            (lambda: Pacer(one, "cosine"), "curve='cosine': legal is a curve"),
            (lambda: Pacer(torch.nn.Linear(1, 1), CURVE), "optimizer=Linear: legal is a torch.optim.Optimizer"),
            (lambda: Pacer([], CURVE), r"optimizer=\[\]"),
            (lambda: Pacer([one, one], CURVE), "the same one is given twice"),
            (lambda: Pacer(one, CURVE, fields=["momentum"]), r"fields=\['momentum'\]: legal is a mapping"),
            (lambda: Pacer(one, CURVE, on_mismatch="eror"), "on_mismatch='eror' is not known .did you mean 'error'"),
        ):
            with pytest.raises(ConfigError, match=words) as caught:
                call()  # type: ignore[no-untyped-call]
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ({"last_epoch": None}, "last_epoch=None; legal is a whole number"),
            ({"last_epoch": -1}, "last_epoch=-1"),
            ({}, "legal is what state_dict"),
            ({"format": 2}, "format=2; this version reads 1"),
            ({"format": 1, "pacer": "{}"}, "legal is what state_dict"),
            ({"format": 1, "last_epoch": 3}, "cannot be read: KeyError"),
            ({"format": 1, "last_epoch": 3, "pacer": "{}"}, "cannot be read: KeyError"),
            ({"format": 1, "last_epoch": 3, "pacer": "[]"}, "cannot be read: TypeError"),
            ({"format": 1, "last_epoch": 3, "pacer": "3"}, "cannot be read"),
            ({"format": 1, "last_epoch": 3, "pacer": "{"}, "cannot be read"),
            ({"format": 1, "last_epoch": 3, "pacer": None}, "cannot be read"),
        ],
    )
    def test_what_is_no_state_changes_nothing(self, state: dict[str, Any], words: str) -> None:
        pacer = Pacer(sgd(), CURVE)
        before = pacer.state_dict()
        with pytest.raises(StateError, match=words) as caught:
            pacer.load_state_dict(state)
        assert "\n" not in str(caught.value)
        assert pacer.state_dict() == before

    @pytest.mark.parametrize("key", ["planned", "planned_fields", "curve", "fields", "groups", "journal", "clock"])
    @pytest.mark.parametrize("value", [3, "x", [1]])
    def test_a_state_with_one_part_spoiled_changes_nothing(self, key: str, value: Any) -> None:
        pacer = Pacer(sgd(), CURVE)
        before = pacer.state_dict()
        inner = {**json.loads(before["pacer"]), key: value}
        with pytest.raises(StateError, match="cannot be read"):
            pacer.load_state_dict({**before, "pacer": json.dumps(inner)})
        assert pacer.state_dict() == before

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
        warnings.simplefilter("error", MupaceWarning)
        dcp.save({"pacer": pacer}, checkpoint_id=tmp_path)
        fresh = Pacer(sgd(), CURVE)
        dcp.load({"pacer": fresh}, checkpoint_id=tmp_path)
    assert fresh.state_dict() == pacer.state_dict()
    assert fresh.get_last_lr() == pacer.get_last_lr()
