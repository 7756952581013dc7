"""What the tests of the controller share: small real runs, policies that propose what a test wants, readings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import mupace
from mupace import Pacer
from mupace.control.chain import read
from mupace.control.commands import Command
from mupace.control.controller import Controller
from mupace.control.engine import Engine
from mupace.control.options import Options
from mupace.policies import Proposal, Reading, register_policy
from mupace.policies.base import State
from mupace.units import Clock

torch.set_num_threads(1)

TEXT = "warmup 10% | hold 60% | linear -> 0"
GROUPS = {"embed": "embedding", "body": "ffn", "head": "head"}


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class Steady:
    """Proposes the same at every so many readings; counts them."""

    name: ClassVar[str] = "steady"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    factor: float = 0.5
    every: int = 5
    target: str = "all"
    kind: str = "scale"
    judged: bool = True
    effect: float = 0.0
    ramp: int = 0
    needs: tuple[str, ...] = ()
    payback: float = 0.0

    def init(self) -> State:
        return {"readings": 0}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        n = state["readings"] + 1
        if n % self.every or (reading.get("loss") is None and reading.get("eval.loss") is None):
            return (), {"readings": n}
        evidence = {"payback": self.payback} if self.payback else {}
        made = Proposal(
            policy=self.name, kind=self.kind, target=self.target, factor=self.factor, judged=self.judged,
            effect=self.effect, ramp=self.ramp, needs=self.needs, reason="it_is_time", evidence=evidence,
        )  # fmt: skip
        return (made,), {"readings": n}


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class Contrary(Steady):
    """The same under another name, to be of another mind."""

    name: ClassVar[str] = "contrary"


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class Follower:
    """Proposes by the loss alone: less rate where it rose since the last reading, more where it fell."""

    name: ClassVar[str] = "follower"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    target: str = "all"
    ramp: int = 7

    def init(self) -> State:
        return {"loss": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        loss, before = reading.get("loss"), state["loss"]
        if loss is None or before is None or loss == before:
            return (), {"loss": loss if loss is not None else before}
        factor = 0.6 if loss > before else 1.4
        return (Proposal(policy="follower", target=self.target, factor=factor, ramp=self.ramp, reason="loss"),), {
            "loss": loss
        }


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class Doorman:
    """Admits no update whose loss is above a number."""

    name: ClassVar[str] = "doorman"
    reads: ClassVar[tuple[str, ...]] = ()
    above: float = 1e9

    def init(self) -> State:
        return {"turned": 0, "seen": 0}

    def admit(self, state: State, step: int, loss: float, grad_norm: float) -> tuple[bool, str, State]:
        good = loss < self.above and math.isfinite(grad_norm)
        seen = {"turned": state["turned"] + (not good), "seen": state["seen"] + 1}
        return good, "" if good else f"loss {loss:g}", seen

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        return (), state


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 6), torch.nn.Flatten(), torch.nn.Linear(24, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )


def groups_of(model: torch.nn.Module, lr: Any = 0.05) -> list[dict[str, Any]]:
    parts: Any = model
    rows = zip(GROUPS.items(), (parts[0], parts[2], parts[4]), (1.0, 2.0, 0.5), strict=True)
    return [
        {"params": list(part.parameters()), "name": name, "role": role, "lr": lr * k} for (name, role), part, k in rows
    ]


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 + i)
    x = torch.randint(0, 11, (8, 4), generator=g)
    return x, (x.sum(1) + torch.randint(0, 2, (8,), generator=g)) % 3


class Run:
    """A training run; with `policies`, under a controller."""

    def __init__(
        self, *, steps: int = 300, directory: Path | None = None, policies: Sequence[Any] | None = None,
        lr: Any = 0.05, kind: Any = torch.optim.AdamW, text: str = TEXT, evals: int = 0, mismatch: Any = "error",
        control: type[Controller] = Controller, **options: Any,
    ) -> None:  # fmt: skip
        self.model = network()
        self.optimizer = kind(groups_of(self.model, lr))
        self.pacer = Pacer(self.optimizer, mupace.schedule(text, total=f"{steps} steps"), on_mismatch=mismatch)
        self.told: list[str] = []
        self.rates: list[tuple[float, ...]] = []
        self.evals, self.i = evals, 0
        self.control: Controller | None = None
        self.before: Callable[[int], None] = lambda i: None
        if policies is not None:
            self.control = control(self.pacer, policies, directory=directory, tell=self.told.append, **options)

    def loss(self, i: int) -> torch.Tensor:
        x, y = batch(i)
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def to(self, stop: int) -> Run:
        while self.i < stop:
            self.before(self.i)
            loss = self.loss(self.i)
            loss.backward()
            if self.control is not None:
                self.control.gradients()
            norm = self.pacer.clip_grad_norm_(1.0)
            if self.control is None or self.control.admit(loss, norm):
                self.rates.append(tuple(float(g["lr"]) for g in self.optimizer.param_groups))
                self.optimizer.step()
            self.pacer.step()
            self.optimizer.zero_grad()
            self.i += 1
            if self.control is not None:
                self.control.step(loss=loss, grad_norm=norm)
                if self.evals and self.i % self.evals == 0:
                    with torch.no_grad():
                        value = sum(float(self.loss(-k)) for k in range(1, 5)) / 4
                    self.control.evaluated("held-out", loss=value)
        return self

    def state(self) -> dict[str, Any]:
        assert self.control is not None
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": _copied(self.optimizer.state_dict()), "pacer": self.pacer.state_dict(),
            "control": json.loads(json.dumps(self.control.state_dict(), allow_nan=False)), "i": self.i,
        }  # fmt: skip

    def load(self, state: dict[str, Any], order: str = "opc", **options: Any) -> Run:
        assert self.control is not None
        self.model.load_state_dict(state["model"])
        for part in order:
            if part == "o":
                self.optimizer.load_state_dict(_copied(state["optimizer"]))
            elif part == "p":
                self.pacer.load_state_dict(state["pacer"])
            else:
                self.control.load_state_dict(state["control"], **options)
        self.i = state["i"]
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def rows(directory: Path) -> list[dict[str, Any]]:
    return read(directory / "control" / "log.jsonl")


def plain(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of readings, decisions and what was written, without their place in the chain."""
    kinds = ("reading", "decision", "applied")
    return [{k: v for k, v in r.items() if k not in ("seq", "prev", "hash")} for r in found if r["type"] in kinds]


def command(op: str, target: str = "all", value: Any = None, **options: Any) -> Command:
    return Command(**{"author": "ada", "reason": "spikes", "op": op, "target": target, "value": value, **options})


def engine(*policies: Any, **options: Any) -> Engine:
    given = {"mode": "act", "bounds": (0.1, 4.0), "holds": 0.0, **options}
    return Engine(Options(**given), policies, GROUPS)


def reading(step: int, state: State | None = None, **values: float) -> Reading:
    """As the controller would make it of a run of 1000 updates whose plan is 0.01 throughout."""
    from mupace.control.limits import total

    known = {f"planned.{g}": 0.01 for g in GROUPS}
    known |= {f"lr.{g}": 0.01 * (total(state, g) if state else 1.0) for g in GROUPS}
    known |= {"paceable": 1.0, "loss": 1.0, "lr_sum": float(step), "plan_sum": float(step)}
    if state is not None:
        known |= {
            f"trim.{source}.{k.rpartition('/')[0]}": f
            for source, mine in state["trims"].items()
            for k, f in mine.items()
        }
    dotted = {k.replace("__", "."): v for k, v in values.items()}
    on = "set" if "eval.loss" in dotted else None
    return Reading(
        clock=Clock(step=step), values={**known, **dotted}, steps=1000, progress=min(step / 1000, 1.0), evaluated=on
    )
