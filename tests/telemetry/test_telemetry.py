"""The object in the loop: state, training untouched, no waiting for a device, the budget, what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import ROLES, ByHand, Loop, Tied, batch, optimizer_of
from torch.utils._python_dispatch import TorchDispatchMode

from mupace.errors import ConfigError, MatchError, StateError
from mupace.params import ParamTable
from mupace.telemetry import Telemetry, Tiers
from mupace.telemetry.decode import names_of
from mupace.telemetry.governor import Governor
from mupace.telemetry.measure import _sample
from mupace.telemetry.ranks import _per_name, _read, _row
from mupace.telemetry.tally import Tally

OFTEN = Tiers(norms=3, moments=6)


def trained(loop: Loop, steps: range, collect: Callable[[int], bool]) -> list[Any]:
    out = []
    for step in steps:
        loop.step([batch(step)])
        if collect(step):
            out.append(loop.telemetry.collect())
    return out


@pytest.mark.parametrize("cut", [20, 23, 27])  # 23 and 27 lie between two collects, with measurements not yet read
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_forty_updates_are_twenty_and_twenty(kind: str, cut: int) -> None:
    def due(step: int) -> bool:
        return step % 10 == 9

    whole = trained(Loop(kind, clip=1.0, tiers=OFTEN), range(40), due)
    first = Loop(kind, clip=1.0, tiers=OFTEN)
    before = trained(first, range(cut), due)
    saved = json.dumps(first.telemetry.state_dict(), allow_nan=False)
    second = Loop(kind, clip=1.0, tiers=OFTEN)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.telemetry.load_state_dict(json.loads(saved))
    assert before + trained(second, range(cut, 40), due) == whole
    assert len(whole) == 4


@pytest.mark.parametrize("what", ["ema", "ring", "angles", "sums"])
def test_every_part_of_the_state_matters(what: str) -> None:
    """The control: a state with one part missing gives another collect."""
    first = Loop("adamw", tiers=OFTEN)
    trained(first, range(23), lambda step: step == 9)
    state = first.telemetry.state_dict()
    found = []
    for spoil in (False, True):
        copy = json.loads(json.dumps(state))
        if spoil:
            copy["tally"][what] = {"ema": [0.0, 0.0], "ring": [], "angles": {}, "sums": {}}[what]
        second = Loop("adamw", tiers=OFTEN)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.telemetry.load_state_dict(copy)
        found += trained(second, range(23, 30), lambda step: step == 29)
    assert found[0] != found[1]


def test_saving_changes_nothing_and_a_foreign_state_is_refused() -> None:
    quiet, saver = Loop("sgd", tiers=OFTEN), Loop("sgd", tiers=OFTEN)
    trained(quiet, range(7), lambda step: False)
    for step in range(7):
        trained(saver, range(step, step + 1), lambda step: False)
        saver.telemetry.state_dict()
    with pytest.raises(StateError, match=r"legal is what Telemetry.state_dict\(\) gave"):
        saver.telemetry.load_state_dict({"updates": 3})
    with pytest.raises(StateError, match="Tiers"):
        saver.telemetry.load_state_dict({**saver.telemetry.state_dict(), "tiers": {"norms": 0}})
    assert saver.telemetry.collect() == quiet.telemetry.collect()


class Noisy(torch.nn.Module):
    """A model whose forward changes buffers and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def noisy_run(measured: bool, restored: bool = True) -> list[torch.Tensor]:
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tiers = Tiers(norms=1, moments=2, headroom=3)
    telemetry = Telemetry(optimizer, tiers=tiers, budget=None) if measured else None
    probes = 0
    for step in range(9):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x)
        loss.backward()
        if telemetry:
            telemetry.gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if telemetry and telemetry.wants_probe:
            assert telemetry.probe(lambda x=x: model(x), model if restored else None) is not None
            probes += 1
        optimizer.zero_grad()
        if telemetry:
            telemetry.observe(loss=loss)
            telemetry.collect()
    assert probes == (3 if measured else 0)
    return [*(t.clone() for t in model.state_dict().values()), torch.get_rng_state()]


def test_training_is_bitwise_what_it_is_without() -> None:
    bare, measured = noisy_run(False), noisy_run(True)
    assert len(bare) == len(measured) == 10
    assert all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))


def test_a_probe_without_the_model_moves_its_buffers() -> None:
    """The control of the bitwise test: the running figures of batch norm see the probe's passes."""
    bare, measured = noisy_run(False), noisy_run(True, restored=False)
    assert not all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, copying off it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "aten.equal" in name:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_device_between_collects() -> None:
    waits = {}
    for measured in (False, True):
        model = Tied()
        optimizer = optimizer_of("adamw", model)
        every = Tiers(norms=1, moments=1, headroom=1)
        telemetry = Telemetry(optimizer, roles=ROLES, tiers=every) if measured else None
        with Waits() as mode:
            for step in range(3):
                loss = model(batch(step))
                loss.backward()
                if telemetry:
                    telemetry.gradients()
                optimizer.step()
                if telemetry:
                    telemetry.observe(loss=loss, grad_norm=loss.detach(), clipped=loss > 1, loss_scale=loss.detach())
        waits[measured] = mode.count
    assert waits[True] == waits[False]
    with Waits() as mode:
        float(loss.detach())
    assert mode.count == 1  # the control: a wait is seen


def test_many_tensors_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop("adamw", tiers=Tiers(norms=1, moments=1))
    trained(loop, range(4), lambda step: False)
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    loop.telemetry.collect()
    monkeypatch.undo()
    assert len(copies) == 2  # what waited; the vector of the ranks, on the host already


def test_what_is_observed_may_be_written_to_afterwards() -> None:
    loop = Loop("sgd")
    loss = torch.tensor(2.0)
    loop.telemetry.observe(loss=loss)
    loss.fill_(7.0)
    assert loop.telemetry.collect().values["loss"] == 2.0


def test_what_nobody_collects_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mupace.telemetry.telemetry._LONGEST", 5)
    loop = Loop("sgd", tiers=Tiers(norms=2))
    trained(loop, range(12), lambda step: False)
    assert len(loop.telemetry._pending) < 5
    reference = Loop("sgd", tiers=Tiers(norms=2))
    trained(reference, range(12), lambda step: False)
    assert loop.telemetry.collect() == reference.telemetry.collect()


def test_hooks_go_with_the_telemetry() -> None:
    loop = Loop("adamw", tiers=Tiers(norms=1))
    assert len(loop.optimizer._optimizer_step_pre_hooks) == len(loop.optimizer._optimizer_step_post_hooks) == 1
    seen = weakref.ref(loop.telemetry)
    loop.telemetry = None
    gc.collect()
    assert seen() is None
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks
    loop.step([batch(0)])


def test_a_loaded_optimizer_and_a_new_group_are_followed() -> None:
    loop = Loop("adamw", tiers=Tiers(norms=1, moments=1))
    loop.step([batch(0)])
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())  # its groups are new objects now
    loop.optimizer.param_groups[0]["lr"] = 0.05
    loop.step([batch(1)])
    hand = ByHand("adamw")
    hand.step([batch(0)])
    hand.lr = 0.05
    truth = hand.step([batch(1)])
    found = loop.telemetry
    values = found.collect().values
    assert values["cos.ffn"] == pytest.approx(truth["cos.ffn"], rel=1e-9)
    extra = torch.nn.Parameter(torch.ones(3).double())
    plain = Telemetry(loop.optimizer, tiers=Tiers(norms=1), budget=None)
    loop.optimizer.add_param_group({"params": [("extra", extra)], "name": "late"})
    extra.grad = torch.ones(3).double()
    plain.gradients()
    loop.optimizer.step()
    plain.observe(loss=1.0)
    assert plain.collect().values["grad_norm.late"] == pytest.approx(3**0.5)


def test_a_step_nobody_announced_is_not_measured() -> None:
    loop = Loop("adamw", tiers=Tiers(norms=1, moments=1))
    loop.model(batch(0)).backward()
    loop.optimizer.step()
    loop.telemetry.observe(loss=1.0)
    assert set(loop.telemetry.collect().values) == {"loss", "loss_last", "loss_ema"}


def test_percentiles_rest_on_a_fair_sample() -> None:
    torch.manual_seed(0)
    wide = torch.nn.ModuleList([torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 32, bias=False)]).double()
    optimizer = torch.optim.AdamW(wide.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    telemetry = Telemetry(optimizer, tiers=Tiers(norms="off", moments=1), budget=None)
    columns = torch.linspace(0.1, 10, 512).double()
    for layer, size in zip(wide, (1.0, 30.0), strict=True):
        layer.weight.grad = torch.randn(layer.weight.shape).double() * columns * size
    telemetry.gradients()
    optimizer.step()
    telemetry.observe(loss=1.0)
    found = telemetry.collect().values
    hat = torch.cat([p.grad.flatten() ** 2 for p in wide.parameters()]).sort().values
    for q in (0.1, 0.5, 0.9, 0.99):
        rank = float(torch.searchsorted(hat, found[f"v_p{round(100 * q)}.group0"])) / len(hat)
        assert abs(rank - q) < 4 * (q * (1 - q) / 4096) ** 0.5, q
    assert found["v_mean.group0"] == pytest.approx(float(hat.mean()))
    naive = torch.cat([p.grad.flatten()[::64] ** 2 for p in wide.parameters()])  # the control: 8 columns of 512
    rank = float(torch.searchsorted(hat, naive.median())) / len(hat)
    assert abs(rank - 0.5) > 4 * (0.25 / 4096) ** 0.5
    assert len(set((torch.arange(512 * 64).view(64, 512) % 512).flatten()[::64].tolist())) == 8
    assert len(set(_sample(torch.arange(512 * 64).view(64, 512) % 512, 64).tolist())) > 500


@pytest.mark.parametrize(("shape", "stride"), [((4096, 64, 1, 1), 64), ((512, 64, 3, 3), 64), ((32, 64, 128), 64)])
def test_a_sample_of_a_kernel_visits_every_input_channel(shape: tuple[int, ...], stride: int) -> None:
    channels = torch.arange(64.0).view(1, 64, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    found = _sample(channels, stride)
    assert len(found.unique()) == 64
    assert abs(len(found) - channels.numel() / stride) < 0.02 * channels.numel() / stride
    assert abs(float(found.mean()) - 31.5) < 0.5
    if len(shape) == 4:  # the control: by rows alone, which are short here
        assert len(channels.flatten()[::stride].unique()) <= 9


@pytest.mark.timeout(20)
def test_a_sample_of_nothing_comes_to_an_end() -> None:
    assert _sample(torch.zeros(10, 0), 5).shape == (0,)
    assert _sample(torch.zeros(0, 10), 5).shape == (0,)


def test_the_spread_of_ranks_is_that_of_their_mean_losses_however_many_they_saw() -> None:
    names, rows, tables = names_of(["all"]), np.zeros((2, 9)), 0.0
    for rank, losses in enumerate(([1.0, 2.0, 3.0], [4.0])):
        tally = Tally()
        for update, loss in enumerate(losses, 1):
            tally.add(update, {"loss": loss}, skipped=False)
        rows[rank] = _row(tally, (0.0, 1.0))
        tables = tables + _per_name(tally, names, names)
    found = _read(names, tables, rows).values
    assert found["rank_spread"] == pytest.approx(4.0 / 3.0)  # means 2 and 4, not sums 6 and 4
    assert found["loss"] == pytest.approx(2.5)  # every step counts once
    weights = [0.98**2 * 0.02, 0.98 * 0.02, 0.02, 0.02]
    assert found["loss_ema"] == pytest.approx(np.average([1.0, 2.0, 3.0, 4.0], weights=weights))


def test_the_budget_doubles_intervals_in_turn() -> None:
    governor, tiers = Governor(0.01), Tiers(norms=10, moments=20)
    for update in range(10, 210, 10):
        tiers = governor.judge(0.5, 10.0, update, tiers)
    assert [(c.update, c.tier, c.before, c.after) for c in governor.changes[:3]] == [
        (20, "norms", 10, 20),
        (40, "moments", 20, 40),
        (80, "norms", 20, 40),
    ]
    assert all(change.share == 0.05 for change in governor.changes)
    assert tiers.scalars == 1


@pytest.mark.parametrize(("budget", "share"), [(None, 0.5), (0.1, 0.05)])
def test_within_the_budget_or_without_one_nothing_changes(budget: float | None, share: float) -> None:
    governor, tiers = Governor(budget), Tiers(norms=10, moments=20)
    for update in range(10, 210, 10):
        assert governor.judge(share, 1.0, update, tiers) == tiers
    assert governor.changes == []
    assert governor.share == share


def test_the_budget_in_a_real_loop() -> None:
    tight, fixed = (Loop("adamw", tiers=Tiers(norms=2, moments=4), budget=b) for b in (1e-6, None))
    for loop in (tight, fixed):
        trained(loop, range(24), lambda step: step % 4 == 3)
        assert loop.telemetry.overhead is None or 0 < loop.telemetry.overhead < 1
    assert [c.tier for c in tight.telemetry.changes[:2]] == ["norms", "moments"]
    assert tight.telemetry.tiers.norms >= 4
    assert fixed.telemetry.changes == ()
    assert fixed.telemetry.tiers == Tiers(norms=2, moments=4)
    again = Loop("adamw", tiers=Tiers(norms=2, moments=4), budget=1e-6).telemetry
    again.load_state_dict(json.loads(json.dumps(tight.telemetry.state_dict())))
    assert again.changes == tight.telemetry.changes
    assert again.tiers == tight.telemetry.tiers


def test_a_tier_that_is_off_measures_nothing() -> None:
    loop = Loop("adamw", tiers=Tiers(scalars="off", norms="off", moments="off"))
    found = trained(loop, range(4), lambda step: step == 3)[0]
    assert found == ({}, (), {"updates": 4, "skipped": 0, "nonfinite": 0})
    assert loop.telemetry._space == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tiers(norms=0), r"Tiers\(norms=0\): legal is a number of updates >= 1, or 'off'"),
        (lambda: Tiers(moments="never"), "moments='never'"),
        (lambda: Loop("sgd", budget=2.0), r"budget=2.0: legal is a share of time in \(0, 1\)"),
        (lambda: Telemetry([]), "legal are one torch optimizer or more"),
        (lambda: Telemetry([object()]), "legal are one torch optimizer or more"),
        (lambda: Loop("sgd").telemetry.observe(loss=torch.ones(3)), r"observe\(loss=a tensor of shape \(3,\)\)"),
        (lambda: Loop("sgd").telemetry.observe(loss="low"), r"observe\(loss='low'\)"),
        (lambda: Loop("sgd").telemetry.observe(loss=1.0, clipped="yes"), r"observe\(clipped='yes'\)"),
    ],
)
def test_what_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_roles_that_do_not_fit_are_refused() -> None:
    model = Tied()
    unnamed = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="has no name in its optimizer"):
        Telemetry(unnamed, roles=ROLES)
    with pytest.raises(MatchError, match=r"no role for 'still'"):
        Telemetry(optimizer_of("sgd", model), roles={"emb.weight": "embedding"})
    with pytest.raises(MatchError, match="ParamTable has no row for"):
        Telemetry(unnamed, roles=ParamTable.of(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="without tensors"):
        Telemetry(unnamed, roles=ParamTable(ParamTable.of(torch.nn.Linear(2, 2)).rows))
