"""What the Pacer writes: groups of their own pace, tensor rates, other hyper-parameters; and clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.optim.lr_scheduler import LambdaLR

import mupace
from mupace import ConfigError, MupaceWarning, Pacer, StateError
from pacing import CURVE, advance, parameters, sgd, update

torch.set_num_threads(1)


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

    def test_removed_groups_of_one_of_several_optimizers_are_refused(self) -> None:
        for which in (0, 1):
            pair = [torch.optim.SGD([{"params": [p]} for p in parameters(2)], lr=0.1) for _ in range(2)]
            pacer = Pacer(pair, CURVE)
            del pair[which].param_groups[1]
            update(pair[0])
            with pytest.raises(StateError, match="the optimizer has 1 groups, it had 2"):
                pacer.step()
            pair[1 - which].add_param_group({"params": parameters(1, seed=5)})  # the sum is right again, the places not
            update(pair[0])
            with pytest.raises(StateError, match="the optimizer has 1 groups, it had 2"):
                pacer.step()

    def test_a_name_is_one_groups(self) -> None:
        """State, journal, logs and set_peak go by it."""
        a, b, c = parameters(3)
        twice = "group 'x': another group has this name; legal are different names"
        with pytest.raises(ConfigError, match=twice):
            Pacer(torch.optim.SGD([{"params": [a], "name": "x"}, {"params": [b], "name": "x"}], lr=0.1), CURVE)
        first, second = (torch.optim.SGD([{"params": [p], "name": "x"}], lr=0.1) for p in (a, b))
        with pytest.raises(ConfigError, match=twice):
            Pacer([first, second], CURVE)
        assert not first._optimizer_step_post_hooks
        pacer = Pacer(first, CURVE)
        with pytest.raises(ConfigError, match=twice):
            pacer.add_param_group({"params": [c], "name": "x"})
        assert len(first.param_groups) == 1
        pacer.add_param_group({"params": [c], "name": "y"})
        pacer.set_peak({"y": 0.4})
        assert pacer.base_lrs == [0.1, 0.4]

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
        for bad in (0.0, -1.0, float("nan"), "1", None, True):
            with pytest.raises(ConfigError, match=f"max_norm={bad!r}: legal is a positive number"):
                pacer.clip_grad_norm_(bad)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=f"clip value={bad!r}: legal is a positive number"):
                pacer.clip_grad_value_(bad)  # type: ignore[arg-type]


def test_a_group_without_names_joins_an_optimizer_with_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(mupace.groups(model, lr=0.1))
    pacer = mupace.Pacer(optimizer, mupace.schedule("hold", total="9 steps"))
    extra = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2))]
    pacer.add_param_group({"params": extra, "lr": 0.2, "name": "new"})
    assert optimizer.param_groups[-1]["param_names"] == ["new.0", "new.1"]
    assert pacer.get_last_lr()[-1] == 0.2
    pacer.add_param_group({"params": [("mine", torch.nn.Parameter(torch.ones(1)))], "lr": 0.3, "name": "more"})
    assert optimizer.param_groups[-1]["param_names"] == ["mine"]
