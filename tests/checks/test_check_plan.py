"""The two items of a scaled model: groups that the plan did not make, schedules that undo its ratios."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim import lr_scheduler as schedulers

import mupace
from mupace import Duration, Pacer, Plan
from mupace.checks import PLAN_ITEMS, Report, check_config, preflight
from mupace.errors import ConfigError
from mupace.trainer.config import RunConfig

torch.set_num_threads(1)


def net(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))


def planned(width: int = 32, base: int = 16, **options: Any) -> tuple[torch.nn.Module, Plan]:
    wide = net(width)
    return wide, mupace.parametrize(wide, base=net(base), inputs=(torch.zeros(2, 6),), **options)


Make = Callable[[torch.optim.Optimizer], Any]


def check(make: Make, width: int = 32, **told: Any) -> Report:
    model, plan = planned(width)
    optimizer = AdamW(plan.groups(lr=1e-2, weight_decay=0.1))
    return preflight(optimizer, make(optimizer), **{"model": model, "total": "20 steps", "plan": plan, **told})


def curve() -> Any:
    return mupace.schedule("warmup 20% | cosine -> 0.1", total="20 steps")


def one_cycle(optimizer: torch.optim.Optimizer, top: Any) -> Any:
    return schedulers.OneCycleLR(optimizer, max_lr=top, total_steps=20)


def rates_of(optimizer: torch.optim.Optimizer, share: float = 1.0) -> list[float]:
    return [share * g["lr"] for g in optimizer.param_groups]


def chained(optimizer: torch.optim.Optimizer, floor: float) -> Any:
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=15, eta_min=floor)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[5])


# the scheduler that undoes the ratios, words of the finding, the same scheduler mended
ABSOLUTE: list[tuple[str, Make, str, Make]] = [
    (
        "cosine",
        lambda o: schedulers.CosineAnnealingLR(o, T_max=20, eta_min=1e-3),
        "CosineAnnealingLR(eta_min=0.001)",
        lambda o: schedulers.CosineAnnealingLR(o, T_max=20),
    ),
    (
        "restarts",
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=20, eta_min=1e-3),
        "CosineAnnealingWarmRestarts(eta_min=0.001)",
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=20),
    ),
    (
        "plateau",
        lambda o: schedulers.ReduceLROnPlateau(o, min_lr=1e-4),
        "ReduceLROnPlateau(min_lr=0.0001)",
        lambda o: schedulers.ReduceLROnPlateau(o, min_lr=rates_of(o, 0.1)),
    ),
    (
        "plateau-list",
        lambda o: schedulers.ReduceLROnPlateau(o, min_lr=[1e-4 * (i + 1) for i in range(len(o.param_groups))]),
        "ReduceLROnPlateau(min_lr=0.0001 to ",
        lambda o: schedulers.ReduceLROnPlateau(o),
    ),
    ("one-cycle", lambda o: one_cycle(o, 1e-2), "OneCycleLR(max_lr=0.01)", lambda o: one_cycle(o, rates_of(o))),
    (
        "cyclic",
        lambda o: schedulers.CyclicLR(o, base_lr=1e-3, max_lr=1e-2, cycle_momentum=False),
        "CyclicLR(max_lr=0.01)",
        lambda o: schedulers.CyclicLR(o, base_lr=rates_of(o, 0.1), max_lr=rates_of(o), cycle_momentum=False),
    ),
    ("nested", lambda o: chained(o, 1e-3), "CosineAnnealingLR(eta_min=0.001)", lambda o: chained(o, 0.0)),
    (
        "own function",
        lambda o: schedulers.LambdaLR(
            o, [lambda i, k=k: 1.0 if k else max(0.1, 1 - i / 20) for k in range(len(o.param_groups))]
        ),
        "LambdaLR gives the groups other ratios from update 1 on",
        lambda o: schedulers.LambdaLR(o, lambda i: max(0.1, 1 - i / 20)),
    ),
]


@pytest.mark.parametrize(("make", "says", "mended"), [row[1:] for row in ABSOLUTE], ids=[row[0] for row in ABSOLUTE])
def test_an_absolute_rate_fails_and_its_remedy_passes(make: Make, says: str, mended: Make) -> None:
    item = check(make)["relative"]
    assert item.verdict == "fail"
    assert says in item.evidence
    assert item.remedy
    assert check(mended)["relative"].verdict in ("pass", "n/a")
    assert check(mended)["plan"].verdict == "pass"


def test_an_absolute_rate_does_no_harm_where_nothing_grew() -> None:
    make: Make = lambda o: schedulers.CosineAnnealingLR(o, T_max=20, eta_min=1e-3)  # noqa: E731
    assert check(make, width=16)["relative"].verdict == "pass"


def test_a_pacer_with_the_plan_passes_both_and_without_it_does_not() -> None:
    model, plan = planned()
    optimizer = AdamW(plan.groups(lr=1e-2))
    report = preflight(optimizer, Pacer(optimizer, curve(), plan=plan), model=model, plan=plan)
    assert (report["plan"].verdict, report["relative"].verdict) == ("pass", "pass")
    assert report["resume"].verdict == "pass"
    assert "×0.5" in report["relative"].evidence
    other = AdamW(plan.groups(lr=1e-2))
    item = preflight(other, Pacer(other, curve()), model=model, plan=plan)["plan"]
    assert item.verdict == "fail"
    assert item.remedy == "Pacer(optimizer, curve, plan=plan)"


def test_groups_of_nobody_or_of_another_plan_fail() -> None:
    model, plan = planned()
    by_hand = AdamW(model.parameters(), lr=1e-2)
    item = preflight(by_hand, schedulers.ConstantLR(by_hand), plan=plan)["plan"]
    assert item.verdict == "fail"
    assert "no plan" in item.evidence
    assert "plan.groups" in item.remedy
    other = AdamW(planned(duration=Duration(batch=4.0, rule="empirical"))[1].groups(lr=1e-2))
    assert "another plan" in preflight(other, schedulers.ConstantLR(other), plan=plan)["plan"].evidence


def test_what_is_not_told_is_not_guessed_and_without_a_plan_nothing_is_said() -> None:
    report = check(lambda o: schedulers.ConstantLR(o), plan=None)
    assert {report[name].verdict for name, _, _ in PLAN_ITEMS} == {"n/a"}
    optimizer = AdamW(net(8).parameters())
    assert not {"plan", "relative"} & {item.name for item in preflight(optimizer, schedulers.ConstantLR(optimizer))}
    with pytest.raises(ConfigError, match=r"plan=dict: legal is what mupace\.parametrize gave"):
        preflight(optimizer, schedulers.ConstantLR(optimizer), plan={})  # type: ignore[arg-type]


def test_a_config_with_the_section_passes_and_its_errors_are_those_of_training(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the rate rises and falls. " * 400)
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = RunConfig.parse(
        {
            "schedule": {"text": "warmup 10% | cosine -> 0", "total": "40 steps"},
            "model": {"config": wide},
            "data": {"text": str(tmp_path / "text.txt"), "seq_len": 16, "cache": str(tmp_path / "cache")},
            "batch": {"micro": 2},
            "parametrize": {"base": base},
        }
    )
    report = check_config(config)
    assert report.passed, str(report)
    assert {report[name].verdict for name, _, _ in PLAN_ITEMS} == {"pass"}
    with pytest.raises(ConfigError, match="head_dim"):
        check_config(config.replace({"parametrize.base": {"hidden_size": 16, "head_dim": 4}}))
