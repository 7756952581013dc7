"""The list on somebody's own loop: real torch schedulers, every item failing once, and its remedy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

import mupace
from mupace import Pacer
from mupace.checks import Report, preflight
from mupace.errors import ConfigError

ROW = {"loss": 1.0, "grad_norm": 1.0, "tokens": 1, "lr": {"a": 0.1, "b": 0.1}, "skipped": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10)


def grouped(model: nn.Module, lr: float = 1e-3, **options: Any) -> AdamW:
    """Matrices with weight decay, the rest without."""
    thin = [p for p in model.parameters() if p.ndim == 1]
    thick = [p for p in model.parameters() if p.ndim > 1]
    return AdamW([{"params": thick}, {"params": thin, "weight_decay": 0.0}], lr=lr, weight_decay=0.1, **options)


def torch_schedule(optimizer: Optimizer, n: int = 100) -> schedulers.LRScheduler:
    """Warmup and cosine without an update at 0."""
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=n - 10)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[10])


Make = Callable[[Optimizer], Any]


def check(make: Make, *, lr: float = 1e-3, model: nn.Module | None = None, **changes: Any) -> Report:
    """The list on a loop of 100 updates with everything told, but for `changes`."""
    model = model or Net()
    optimizer = grouped(model, lr)
    told = {"total": "100 steps", "updates": 100, "calls_per_update": 1, "peak": lr, "floor": 0.0, "stage": "pretrain"}
    return preflight(optimizer, make(optimizer), **{"model": model, "logged": ROW, **told, **changes})


def ours(text: str = "warmup 10% | cosine -> 0", total: str = "100 steps", **keys: Any) -> Make:
    return lambda optimizer: Pacer(optimizer, mupace.schedule(text, total=total, **keys))


@pytest.mark.parametrize("make", [torch_schedule, ours()], ids=["torch", "pacer"])
def test_a_good_loop_passes_every_item_that_can_be_looked_at(make: Make) -> None:
    report = check(make)
    assert report.passed, str(report)
    found = {item.name for item in report if item.verdict == "n/a"}
    assert found == ({"ranks", "stage", "skipped"} if make is torch_schedule else {"ranks", "stage"})


@pytest.mark.parametrize("make", [torch_schedule, ours()], ids=["torch", "pacer"])
def test_what_is_not_told_is_not_guessed(make: Make) -> None:
    optimizer = grouped(Net())
    report = preflight(optimizer, make(optimizer))
    reasons = {item.name: item.evidence for item in report if item.verdict == "n/a"}
    assert "updates=" in reasons["total"]
    assert "model=" in reasons["decay"]
    assert "logged=" in reasons["logged"]
    assert "stage=" in reasons["stage"]
    assert "one process" in reasons["ranks"]
    if make is torch_schedule:
        assert "scaler=" in reasons["skipped"]
        assert "calls_per_update=" in reasons["advance"]
        assert "peak=" in reasons["endpoints"]
        assert report.failed == ("written",)
    else:
        assert report.passed


def constant_then(factor: Callable[[int], float]) -> Make:
    return lambda optimizer: schedulers.LambdaLR(optimizer, factor)


def lr_changed_later(optimizer: Optimizer) -> Any:
    scheduler = torch_schedule(optimizer)
    optimizer.param_groups[0]["lr"] = 5e-4
    return scheduler


def on_another_optimizer(optimizer: Optimizer) -> Any:
    return torch_schedule(grouped(Net()))


def cosine(n: int) -> Make:
    return lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=n)


GRAD_SCALER = torch.amp.GradScaler("cpu")

# item, how the loop is made, what is told, words of the evidence, words of the remedy, the mended loop, what is told
FAILING: list[tuple[str, Make, dict[str, Any], str, str, Make, dict[str, Any]]] = [
    ("units", constant_then(lambda i: max(0.1, 1 - i / 50)), {"floor": 1e-4},
     "it finishes at update 45 of 100, 45 % of the run", "build LambdaLR for 100 updates",
     constant_then(lambda i: max(0.1, 1 - i / 110)), {"floor": 1e-4}),
    ("units", lambda o: schedulers.CosineAnnealingLR(o, T_max=100, eta_min=1e-2),
     {"peak": None, "floor": None, "updates": 99},
     "still rising when the run ends", "(eta_min) lower than the lr", cosine(100), {}),
    ("units", constant_then(lambda i: min(1.0, (i + 1) / 1000)), {"peak": None, "floor": None, "accumulate": 10},
     "still rising when the run ends", "100 updates (a count of micro-batches divided by accumulate=10)",
     constant_then(lambda i: min(1.0, (i + 1) / 99)), {"peak": None, "floor": None}),
    ("total", cosine(400), {"accumulate": 4, "floor": None},
     "the loop makes: 100 updates; a total of 100 steps: 100 updates; CosineAnnealingLR.T_max: 400 updates",
     "counts micro-batches: divide it by accumulate=4, which gives 100", cosine(100), {"accumulate": 4}),
    ("total", cosine(100), {"updates": 300, "floor": None}, "a total of 100 steps", "done at 33.3 % of the run",
     cosine(300), {"updates": 300, "total": "300 steps"}),
    ("total", ours(), {"updates": 90, "total": None}, "the loop makes: 90 updates; the curve: 100 updates",
     "both the same", ours(total="90 steps"), {"updates": 90, "total": "90 steps"}),
    ("peaks", constant_then(lambda i: min(i / 10, 1 - i / 200)), {"floor": None},
     "the first update of group0 has a rate of 0", "(i + 1)/warmup",
     constant_then(lambda i: min((i + 1) / 10, 1 - i / 200)), {"floor": None}),
    ("peaks", constant_then(lambda i: 0.0 if i == 99 else 1 - i / 100), {"peak": None},
     "the last update of group0 has a rate of 0", "one update longer",
     constant_then(lambda i: 1 - i / 100), {"peak": None}),
    ("peaks", lr_changed_later, {}, "has lr=0.0005 in the optimizer, the scheduler has 0.0001",
     "before the scheduler is built", torch_schedule, {}),
    ("skipped", torch_schedule, {"scaler": GRAD_SCALER}, "the skipped update advanced it", "mupace.Pacer",
     ours(), {"scaler": GRAD_SCALER}),
    ("logged", torch_schedule, {"logged": {"loss", "lr", "step"}},
     "no gradient norm, no tokens or samples, no learning rate of every group (1 of 2: group0, group1)",
     "log for every update also: gradient norm", torch_schedule, {"logged": ROW}),
    ("logged", ours(), {"logged": ["train/loss", "grad_norm", "lr/0", "lr/1", "tokens"], "scaler": GRAD_SCALER},
     "no skipped updates", "skipped updates", ours(), {"logged": ROW, "scaler": GRAD_SCALER}),
    ("endpoints", torch_schedule, {"peak": 3e-3}, "the peak is 0.001, not 0.003", "peak=0.001",
     torch_schedule, {"peak": 1e-3}),
    ("endpoints", torch_schedule, {"floor": 1e-4}, "the floor is 0, not 0.0001", "floor=0",
     torch_schedule, {"floor": 0.0}),
    ("endpoints", ours("warmup 10% | hold"), {"floor": 1e-4}, "not 0.0001", "decay",
     ours("warmup 10% | linear -> 0.1"), {"floor": 1e-4}),
    ("stage", torch_schedule, {"stage": "preference"}, "bound 5e-06", "5e-06 or less",
     torch_schedule, {"stage": "preference", "lr": 5e-6, "peak": 5e-6}),
    ("written", torch_schedule, {"total": None}, "SequentialLR milestone 10 + CosineAnnealingLR.T_max = 100",
     "total='100 steps'", torch_schedule, {}),
    ("written", torch_schedule, {"total": 100}, "total=100 has no unit", "total='100 steps'", torch_schedule, {}),
    ("advance", torch_schedule, {"calls_per_update": 4}, "runs 4 times as fast", "mupace.Pacer",
     ours(), {"calls_per_update": 4}),
    ("advance", on_another_optimizer, {}, "does not write to the same optimizer", "on the optimizers that are stepped",
     torch_schedule, {}),
]  # fmt: skip


@pytest.mark.parametrize("case", FAILING, ids=lambda c: f"{c[0]}: {c[3][:30]}")
def test_a_wrong_loop_fails_its_item_and_the_remedy_mends_it(case: Any) -> None:
    item, make, told, evidence, remedy, mended, told_then = case
    report = check(make, **told)
    assert report.failed == (item,), str(report)
    assert evidence in report[item].evidence
    assert remedy in report[item].remedy
    assert check(mended, **told_then).passed, str(check(mended, **told_then))


def test_norms_and_biases_that_decay() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    report = preflight(optimizer, ours()(optimizer), model=model)
    assert report.failed == ("decay",)
    assert "3 tensors" in report["decay"].evidence
    assert "norm.weight, norm.bias, head.bias" in report["decay"].evidence
    plain = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert preflight(plain, ours()(plain)).failed == ("decay",), "seen by shape without the model"
    mended = AdamW(mupace_groups(model), lr=1e-3)
    assert preflight(mended, ours()(mended), model=model).passed


def mupace_groups(model: nn.Module) -> Any:
    from mupace.scales import groups

    return groups(model, lr=1e-3, weight_decay=0.1)


def test_tensors_in_no_group_in_two_and_of_another_model() -> None:
    model = Net()
    some = AdamW(model.embedding.parameters(), lr=1e-3, weight_decay=0.0)
    report = preflight(some, ours()(some), model=model)
    assert report.failed == ("decay",)
    assert "4 trainable tensors are in no optimizer group" in report["decay"].evidence
    for name in ("norm", "head"):
        getattr(model, name).requires_grad_(False)
    some = AdamW(model.embedding.parameters(), lr=1e-3, weight_decay=0.0)
    assert preflight(some, ours()(some), model=model).passed, "the remedy: requires_grad_(False)"
    for name in ("norm", "head"):
        getattr(model, name).requires_grad_(True)

    twice = [grouped(model), AdamW(model.embedding.parameters(), lr=1e-3)]
    report = preflight(twice, ours()(twice), model=model)
    assert report.failed == ("decay",)
    assert "1 tensors are in several groups" in report["decay"].evidence

    strangers = AdamW([*Net().parameters(), *model.parameters()], lr=1e-3, weight_decay=0.0)
    report = preflight(strangers, ours()(strangers), model=model)
    assert report.failed == ("decay",)
    assert "5 of the optimizer's 10 tensors are not the model's" in report["decay"].evidence


def test_a_model_of_unknown_roles_is_judged_by_shape() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thing = nn.Parameter(torch.zeros(3))
            self.matrix = nn.Parameter(torch.zeros(3, 3))

    model = Odd()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    report = preflight(optimizer, ours()(optimizer), model=model)
    assert report.failed == ("decay",)
    assert "by shape" in report["decay"].evidence
    optimizer = grouped(model)
    assert preflight(optimizer, ours()(optimizer), model=model).passed


def test_a_rate_from_numpy_cannot_be_read_back() -> None:
    model = Net()
    optimizer = grouped(model, lr=np.logspace(-4, -2, 3)[1])
    report = preflight(optimizer, torch_schedule(optimizer), model=model, total="100 steps")
    assert report.failed == ("resume",)
    assert "lr=float(lr)" in report["resume"].remedy
    optimizer = grouped(model, lr=float(np.logspace(-4, -2, 3)[1]))
    assert preflight(optimizer, torch_schedule(optimizer), model=model, total="100 steps").passed


class Forgetful(Pacer):
    """Saves its position one update late."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "last_epoch": max(0, state["last_epoch"] - 1)}


class Eager(Pacer):
    """Moves at every call."""

    def step(self, epoch: object = None, **_: Any) -> None:
        super().step(applied=True)


def test_a_pacer_that_forgets_or_runs_ahead_is_found() -> None:
    curve = mupace.schedule("warmup 10% | cosine -> 0", total="100 steps")
    report = check(lambda o: Forgetful(o, curve))
    assert report.failed == ("resume",)
    assert "saved at update 1 and loaded" in report["resume"].evidence
    report = check(lambda o: Eager(o, curve))
    assert report.failed == ("skipped", "advance")
    assert "a call without an update moves it by 1, an update and 3 calls by 3" in report["advance"].evidence
    assert check(lambda o: Pacer(o, curve)).passed


class Bouncing(Pacer):
    """Starts again after the end, as a periodic schedule does."""

    def seek(self, *, step: int | None = None, tokens: int | None = None) -> None:
        super().seek(step=None if step is None else step % 100, tokens=tokens)


def test_a_rate_that_rises_again_after_the_end() -> None:
    curve = mupace.schedule("warmup 10% | cosine -> 0", total="100 steps")
    report = check(lambda o: Bouncing(o, curve), floor=None)
    assert report.failed == ("endpoints",)
    assert "it moves on after the end" in report["endpoints"].evidence
    assert check(lambda o: Pacer(o, curve), floor=None).passed


def test_a_torch_scheduler_that_loses_its_place() -> None:
    class Lost(schedulers.LambdaLR):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Starts again."""

    report = check(lambda o: Lost(o, lambda i: 1 - i / 100))
    assert report.failed == ("resume",)
    assert "carry its whole position" in report["resume"].remedy
    assert check(lambda o: schedulers.LambdaLR(o, lambda i: 1 - i / 100)).passed
    assert check(lambda o: Lost(o, lambda i: 1 - i / 100), resume=False)["resume"].verdict == "n/a"


def snapshot(optimizer: Optimizer, scheduler: Any, model: nn.Module, scaler: Any) -> bytes:
    """Everything that can be saved of a loop, to the last bit, and the generators."""
    file = io.BytesIO()
    hooks = {k: [str(v) for v in d] for k, d in optimizer.__dict__.items() if k.endswith("_hooks")}
    groups = [{k: str(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    ids = [[id(g), id(g["lr"]), *map(id, g["params"])] for g in optimizer.param_groups]
    state = [optimizer.state_dict(), scheduler.state_dict(), model.state_dict(), scaler.state_dict()]
    grads = [p.grad for p in model.parameters()]
    torch.save([state, hooks, groups, ids, grads, torch.get_rng_state(), sorted(optimizer.__dict__)], file)
    return file.getvalue()


def one_cycle(optimizer: Optimizer) -> Any:
    return schedulers.OneCycleLR(optimizer, max_lr=1e-3, total_steps=100)


@pytest.mark.parametrize("make", [torch_schedule, one_cycle, ours()], ids=["sequential", "one-cycle", "pacer"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_the_loop_is_not_touched(make: Make, tensor: bool) -> None:
    model, scaler = Net(), torch.amp.GradScaler("cpu")
    optimizer = grouped(model, lr=torch.tensor(1e-3) if tensor else 1e-3)
    scheduler = make(optimizer)
    for _ in range(3):
        loss = model.head(model.norm(model.embedding(torch.arange(10)))).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
    before = snapshot(optimizer, scheduler, model, scaler)
    report = preflight(
        optimizer, scheduler, model=model, scaler=scaler, updates=100, total="100 steps", calls_per_update=1
    )
    assert snapshot(optimizer, scheduler, model, scaler) == before
    assert report["resume"].verdict == "pass"
    # the negative control: a real update is seen by the comparison
    optimizer.step()
    scheduler.step()
    assert snapshot(optimizer, scheduler, model, scaler) != before


def test_the_pacer_still_counts_after_the_check() -> None:
    model = Net()
    optimizer = grouped(model)
    pacer = ours()(optimizer)
    preflight(optimizer, pacer, model=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    pacer.step()
    assert pacer.clock.step == 1


def test_no_parameter_and_no_moment_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = grouped(model)
    scheduler = torch_schedule(optimizer)
    scheduler.model = model  # as some people's own schedulers keep it
    seen: list[object] = []
    original = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: seen.append(p) or original(p, memo))
    preflight(optimizer, scheduler, model=model, total="100 steps")
    assert seen == []
    copy.deepcopy(model)
    assert len(seen) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.StepLR(o, step_size=30),
        lambda o: schedulers.ExponentialLR(o, gamma=0.99),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=25),
        lambda o: schedulers.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=25, cycle_momentum=False),
        lambda o: schedulers.PolynomialLR(o, total_iters=100),
        lambda o: schedulers.MultiStepLR(o, milestones=[40, 80]),
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, gamma=0.99)], o),
        lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=20),
        one_cycle,
    ],
    ids=["step", "exp", "restarts", "cyclic", "poly", "multi", "chained", "swa", "one-cycle"],
)
def test_every_torch_scheduler_is_followed(make: Make) -> None:
    report = check(make, peak=None, floor=None)
    assert report["resume"].verdict == "pass", report["resume"].evidence
    assert report["peaks"].verdict == "pass", report["peaks"].evidence
    assert report["endpoints"].evidence.startswith("group0: first update ")


def test_transformers_schedules_say_their_length() -> None:
    from transformers import get_cosine_schedule_with_warmup

    def make(n: int) -> Make:
        return lambda o: get_cosine_schedule_with_warmup(o, num_warmup_steps=10, num_training_steps=n)

    report = check(make(100))
    assert report.failed == ("peaks",), "its first update has a rate of 0"
    report = check(make(50), floor=None)
    assert report["total"].verdict == "fail"
    assert "num_training_steps: 50 updates" in report["total"].evidence


def test_a_plateau_scheduler_is_not_known_beforehand() -> None:
    report = check(schedulers.ReduceLROnPlateau)
    assert report.passed
    assert "follows a measured metric" in report["peaks"].evidence
    assert report["peaks"].verdict == report["resume"].verdict == report["endpoints"].verdict == "n/a"


def test_a_one_cycle_that_is_too_short_stops_with_an_error() -> None:
    report = check(lambda o: schedulers.OneCycleLR(o, max_lr=1e-3, total_steps=80), floor=None)
    assert report.failed == ("total",)
    assert "then ValueError at update 81" in report["endpoints"].evidence


def test_accelerates_wrappers_are_looked_into() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True)
    model = Net()
    optimizer = grouped(model)
    scheduler = torch_schedule(optimizer)
    _, wrapped_optimizer, wrapped = accelerator.prepare(model, optimizer, scheduler)
    report = preflight(wrapped_optimizer, wrapped, model=model, total="100 steps", scaler=GRAD_SCALER)
    assert report.passed, str(report)
    assert report["advance"].verdict == "pass"
    assert "Accelerate" in report["skipped"].evidence
    report = preflight(wrapped_optimizer, wrapped, model=model, total="100 steps", calls_per_update=8)
    assert report.failed == ("advance",)
    assert "8 calls per update (Accelerate's wrapper, once per process)" in report["advance"].evidence
    AcceleratorState._reset_state(reset_partial_state=True)


def test_tokens_are_recomputed_from_the_batch() -> None:
    told = {"samples_per_step": 8, "tokens_per_sample": 16, "total": "12800 tokens"}
    report = check(torch_schedule, **told)
    assert report.passed, str(report)
    assert "100 updates × 8 samples × 16 tokens = 12.8k tokens" in report["total"].evidence
    report = check(torch_schedule, **{**told, "samples_per_step": 4})
    assert report.failed == ("total",)
    report = check(torch_schedule, total="12800 tokens")
    assert report["total"].verdict == "n/a"
    assert "give samples_per_step= and tokens_per_sample=" in report["total"].evidence


def test_groups_that_begin_later_may_miss_the_peak() -> None:
    model = Net()
    optimizer = grouped(model)
    optimizer.param_groups[1]["unfreeze"] = "50%"
    report = preflight(optimizer, ours()(optimizer), model=model)
    assert report["peaks"].verdict == "pass", report["peaks"].evidence


def test_a_long_run_is_looked_at_on_a_grid() -> None:
    report = check(ours(total="2M steps"), total=None, updates=2_000_000)
    assert report.passed, str(report)
    assert "total 2M steps" in report["units"].evidence
    report = check(ours("warmup 10% | linear 40% -> 0 | hold", total="2M steps"), total=None, updates=2_000_000)
    assert report.failed == ("peaks",)
    report = check(cosine(2_000_000), total="2M steps", updates=2_000_000)
    assert "longer than the 100k updates" in report["peaks"].evidence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": nn.Linear(2, 2)}, "optimizer=Linear"),
        ({"optimizer": []}, "at least one"),
        ({"scheduler": object()}, "scheduler=object"),
        ({"updates": 0}, "updates=0"),
        ({"accumulate": 0.5}, "accumulate=0.5"),
        ({"stage": "sfft"}, "did you mean 'sft'"),
        ({"total": "100"}, "no unit"),
        ({"peak": "x"}, "peak='x': legal is a learning rate"),
        ({"peak": -1.0}, "peak=-1.0"),
        ({"floor": float("nan")}, "floor=nan"),
        ({"floor": True}, "floor=True"),
        ({"model": "llama"}, "model=str: legal is a torch.nn.Module"),
        ({"samples_per_step": 0}, "samples_per_step=0"),
    ],
)
def test_wrong_arguments_are_one_line(change: dict[str, Any], words: str) -> None:
    optimizer = grouped(Net())
    arguments = {"optimizer": optimizer, "scheduler": torch_schedule(optimizer), **change}
    with pytest.raises(ConfigError, match=words) as caught:
        preflight(**arguments)
    assert "\n" not in str(caught.value)


def _rank(rank: int, folder: str, lr_of_rank_one: float) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    optimizer = grouped(Net(), lr=1e-3 if rank == 0 else lr_of_rank_one)
    report = preflight(optimizer, ours()(optimizer))
    (Path(folder) / f"{rank}.txt").write_text(f"{report['ranks'].verdict}: {report['ranks'].evidence}")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(("lr", "verdict"), [(1e-3, "pass"), (2e-3, "fail")])
def test_ranks_agree_or_are_named(tmp_path: Path, lr: float, verdict: str) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), lr), nprocs=2)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith(verdict)
    assert ("rank 1 has other highest rates than rank 0: [0.00199" in said[0]) == (verdict == "fail")


def test_one_rank_of_a_world_of_one_is_one_process(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert "size 1" in check(torch_schedule)["ranks"].evidence
    finally:
        torch.distributed.destroy_process_group()
