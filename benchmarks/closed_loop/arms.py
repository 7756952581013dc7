"""What paces the learning rate: one class per way, all with the same calls.

admit(loss, norm)          before the update; False leaves it out
step(i, loss, again)       after update i; writes the rate of update i + 1; again() is the loss on the same batch now
evaluated(loss, averaged)  after an evaluation that the arm is told of
weights()                  a context in which the model holds the weights that are judged
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import mupace
from closed_loop.tasks import Task

WARMUP = 0.05
BETAS, DECAY = (0.9, 0.95), 0.1
BOUNDS = (1 / 8, 8.0)
PLANS = {
    "linear": "warmup 5% | linear -> 0",
    "cosine": "warmup 5% | cosine -> 0.1",
    "wsd": "warmup 5% | hold 75% | sqrt 20% -> 0",
    "constant": "warmup 5% | hold",
}
NEEDS = {"schedule_free": "schedulefree", "prodigy": "prodigyopt"}
"""Packages of PyPI that two arms need and the project does not."""


def missing(arm: str) -> str | None:
    """The package that this arm needs and that cannot be imported."""
    package = NEEDS.get(arm)
    return package if package and find_spec(package) is None else None


class Arm:
    """A plan, walked open-loop."""

    listens = False  # to evaluations
    plan = "linear"

    def __init__(self, task: Task, model: Any, lr: float, seed: int, given: Sequence[float] | None = None) -> None:
        self.task, self.model, self.peak, self.seed, self.given = task, model, lr, seed, given
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.make()
        self.curve = mupace.schedule(PLANS[self.plan], total=f"{task.steps} steps")
        self.factors: list[float] = self.curve.updates().tolist()
        self.start()

    def make(self) -> torch.optim.Optimizer:
        if self.task.optimizer == "sgd":
            return torch.optim.SGD(self.params, lr=self.peak)
        return torch.optim.AdamW(self.params, lr=self.peak, betas=BETAS, weight_decay=DECAY, fused=True)

    def start(self) -> None:
        self.write(self.peak * self.factors[0])

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def write(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def admit(self, loss: float, norm: float) -> bool:
        return True

    def gradients(self) -> None:
        """After the backward pass, before clipping."""

    def averaged(self) -> AbstractContextManager[None] | None:
        """A context in which the model holds averaged weights, for an arm that wants to be told their loss too."""
        return None

    def step(self, i: int, loss: float, again: Callable[[], float]) -> None:
        if i + 1 < self.task.steps:
            self.pace(i + 1, loss)

    def pace(self, i: int, loss: float) -> None:
        """Write the rate of update i; `loss` is that of the update before."""
        self.write(self.peak * self.factors[i])

    def evaluated(self, loss: float, averaged: float | None) -> None:
        pass

    @contextmanager
    def weights(self) -> Iterator[None]:
        yield

    def notes(self) -> dict[str, Any]:
        """What the row of results says of this arm beside its loss."""
        return {}


class Average:
    """Exponential average of the weights over a tenth of the run, unbiased at the start."""

    def __init__(self, params: list[Tensor], steps: int) -> None:
        self.params, self.n, self.share = params, 0, 1 / max(1.0, 0.1 * steps)
        self.kept = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.params], max(1 / self.n, self.share))

    @contextmanager
    def applied(self) -> Iterator[None]:
        now = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.kept)
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.params, now)


class Cosine(Arm):
    plan = "cosine"


class Wsd(Arm):
    plan = "wsd"


class Averaged(Arm):
    plan = "constant"

    def start(self) -> None:
        self.average = Average(self.params, self.task.steps)
        super().start()

    def step(self, i: int, loss: float, again: Callable[[], float]) -> None:
        self.average.update()
        super().step(i, loss, again)

    @contextmanager
    def weights(self) -> Iterator[None]:
        with self.average.applied():
            yield


class ScheduleFree(Arm):
    """Its warm-up is its own; its averaging takes the place of a plan."""

    plan = "constant"

    def make(self) -> torch.optim.Optimizer:
        import schedulefree

        warmup = round(WARMUP * self.task.steps)
        if self.task.optimizer == "sgd":
            made: Any = schedulefree.SGDScheduleFree(self.params, lr=self.peak, warmup_steps=warmup)
        else:
            made = schedulefree.AdamWScheduleFree(
                self.params, lr=self.peak, betas=(0.9, 0.999), weight_decay=DECAY, warmup_steps=warmup
            )
        made.train()
        return made

    def start(self) -> None:
        pass

    def pace(self, i: int, loss: float) -> None:
        pass

    @contextmanager
    def weights(self) -> Iterator[None]:
        made: Any = self.optimizer
        made.eval()
        yield
        made.train()


class Prodigy(Arm):
    """`lr` is its multiplier; the plan multiplies it."""

    def make(self) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy

        with redirect_stdout(io.StringIO()):  # it announces its decay
            return Prodigy(
                self.params,
                lr=self.peak,
                betas=BETAS,
                weight_decay=DECAY if self.task.optimizer == "adamw" else 0.0,
                use_bias_correction=True,
                safeguard_warmup=True,
            )


class Warmed(Arm):
    """Warm-up, then whatever the scheduler of someone else does."""

    plan = "constant"

    def pace(self, i: int, loss: float) -> None:
        if i <= round(WARMUP * self.task.steps):
            self.write(self.peak * self.factors[i])
        else:
            self.move(i, loss)

    def move(self, i: int, loss: float) -> None:
        pass


class Plateau(Warmed):
    listens = True

    def start(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=1, threshold=1e-3, threshold_mode="abs", min_lr=self.peak / 100
        )
        super().start()

    def evaluated(self, loss: float, averaged: float | None) -> None:
        self.scheduler.step(loss)


class Greedy(Warmed):
    def start(self) -> None:
        from transformers.optimization import GreedyLR

        self.scheduler = GreedyLR(
            self.optimizer,
            factor=0.95,
            patience=5,
            min_lr=self.peak / 100,
            max_lr=self.peak * 8,
            eps=0.0,
            smooth=True,
            window_size=20,
        )
        super().start()

    def move(self, i: int, loss: float) -> None:
        self.scheduler.step(loss)


class AdaLRS(Arm):
    """Our reading of arXiv 2506.13274: try a factor for a window, keep it when the loss falls faster, else go back."""

    K, UP, DOWN, SHRINK, UNTIL = 15, 2.0, 0.5, 0.9, 0.6

    def start(self) -> None:
        self.scale, self.trial, self.trials = 1.0, 1.0, 0
        self.up = True
        self.window: list[float] = []
        self.before_trial: float | None = None  # velocity
        self.kept: tuple[Any, Any] | None = None
        super().start()

    def pace(self, i: int, loss: float) -> None:
        warm = i > round(WARMUP * self.task.steps)
        if warm and i <= self.UNTIL * self.task.steps:
            self.window.append(loss)
            if len(self.window) == self.K:
                self.judge()
                self.window = []
        elif warm and self.before_trial is not None:  # a trial that nobody will judge
            self.scale /= self.trial
            self.before_trial = None
        self.write(self.peak * self.factors[i] * self.scale)

    def judge(self) -> None:
        velocity = -slope(self.window)
        if self.before_trial is not None and not velocity > self.before_trial:
            self.scale /= self.trial
            self.up = not self.up
            self.put_back()
            self.before_trial = None  # one window at the old rate before the next trial
            return
        self.before_trial, self.kept = velocity, self.snapshot()
        self.trial = (self.UP if self.up else self.DOWN) ** (self.SHRINK**self.trials)
        self.trials += 1
        self.scale *= self.trial

    def snapshot(self) -> tuple[Any, Any]:
        return [p.detach().clone() for p in self.params], copy.deepcopy(self.optimizer.state_dict()["state"])

    def put_back(self) -> None:
        assert self.kept
        weights, state = self.kept
        with torch.no_grad():
            torch._foreach_copy_(self.params, weights)
        now = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**now, "state": state})

    def notes(self) -> dict[str, Any]:
        return {"scale": round(self.scale, 4), "trials": self.trials}


def slope(values: Sequence[float]) -> float:
    """Least squares, per update; NaN where a value is not finite."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float(x @ np.asarray(values) / (x @ x))


class Guards(Arm):
    """Skip-step as in OLMo-core: an update far outside the last 128 is left out."""

    WINDOW, FIRST, SIGMAS = 128, 32, 6.0

    def start(self) -> None:
        self.seen = [deque[float](maxlen=self.WINDOW), deque[float](maxlen=self.WINDOW)]
        super().start()

    def admit(self, loss: float, norm: float) -> bool:
        values = (loss, norm)
        if not all(map(math.isfinite, values)):
            return False
        usual = all(self.usual(v, past) for v, past in zip(values, self.seen, strict=True))
        for v, past in zip(values, self.seen, strict=True):
            past.append(v)
        return usual

    def usual(self, value: float, past: deque[float]) -> bool:
        return len(past) < self.FIRST or value <= float(np.mean(past) + self.SIGMAS * np.std(past))


class Replayed(Arm):
    """Rates that are given, one per update, as factors of the peak."""

    def start(self) -> None:
        assert self.given is not None
        assert len(self.given) == self.task.steps
        self.factors = list(self.given)
        super().start()


@cache
def code() -> str:
    """A hash over the source of what decides: the rows of one comparison must have the same."""
    root = Path(mupace.__file__).parent
    files = sorted(p for folder in ("control", "policies", "telemetry", "pacer") for p in (root / folder).glob("*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


class Ours(Arm):
    """Linear to zero, and the Controller; the defaults but for lengths, which a run of 300 updates needs smaller."""

    listens = True
    policies = ("guard", "time", "bias", "rate")
    every: int = 2
    probes: int | str = 4
    lengths: ClassVar[dict[str, Any]] = {"horizon_steps": 40, "horizon": 0.1, "horizon_evals": 4}

    def start(self) -> None:
        from mupace.control import Controller
        from mupace.telemetry import Averaged, Telemetry, Tiers

        self.pacer = mupace.Pacer(self.optimizer, self.curve)
        tiers = Tiers(norms=self.every, moments="off", headroom=self.probes)
        self.telemetry = Telemetry(self.optimizer, tiers=tiers, budget=None)
        self.smooth = Averaged(self.model.named_parameters(), every=self.every)
        self.controller = Controller(
            self.pacer,
            policies=self.policies,
            telemetry=self.telemetry,
            mode="act",
            bounds=BOUNDS,
            every=self.every,
            seed=self.seed,
            **self.lengths,
        )
        self.admitted, self.norm = True, 0.0

    def gradients(self) -> None:
        self.controller.gradients()

    def admit(self, loss: float, norm: float) -> bool:
        self.norm, self.admitted = norm, self.controller.admit(loss, norm)
        return self.admitted

    def step(self, i: int, loss: float, again: Callable[[], float]) -> None:
        if not self.admitted:  # the batch is consumed all the same, as in `guards`
            self.pacer.step(applied=True)
            self.controller.step()
            return
        if self.telemetry.wants_probe:
            self.telemetry.probe(again)
        self.pacer.step()
        self.smooth.update()
        self.controller.step(loss=loss, grad_norm=self.norm)

    def averaged(self) -> AbstractContextManager[None]:
        return self.smooth.swapped()

    def evaluated(self, loss: float, averaged: float | None) -> None:
        self.controller.evaluated("valid", loss=loss, averaged=averaged)

    def notes(self) -> dict[str, Any]:
        """How many decisions, and what was carried out, by policy and reason."""
        counts: dict[str, int] = {}
        for outcome in (o for d in self.controller.decisions for o in d.outcomes):
            name = f"{outcome.what} {outcome.proposal['policy']} {outcome.proposal['reason']}"
            counts[name] = counts.get(name, 0) + 1
        applied = sum(n for name, n in counts.items() if name.startswith("applied"))
        return {"decisions": applied, "outcomes": counts, "code": code()}


class OnWsd(Ours):
    """The same on the plan of `wsd`."""

    plan = "wsd"


class AsShipped(Ours):
    """The Controller with every option and interval as by default, headroom not measured."""

    every, probes = 10, "off"
    lengths: ClassVar[dict[str, Any]] = {}


ARMS: dict[str, type[Arm]] = {
    "linear": Arm,
    "cosine": Cosine,
    "wsd": Wsd,
    "averaged": Averaged,
    "schedule_free": ScheduleFree,
    "prodigy": Prodigy,
    "plateau": Plateau,
    "greedy": Greedy,
    "adalrs": AdaLRS,
    "guards": Guards,
    "ours": Ours,
    "as_shipped": AsShipped,
    "ours_wsd": OnWsd,
    "yoked": Replayed,
    "sham": Replayed,
    "pooled": Replayed,
}
SECONDARY = ("as_shipped", "ours_wsd", "pooled")
"""Reported, and part of no decision: the best loss of a seed is not looked for among them either."""
OPEN = ("linear", "cosine", "wsd", "averaged", "schedule_free", "guards")
"""From which the comparator of H1 is taken."""
CORE = ("linear", "wsd", "guards", "ours", "yoked", "sham")
SOME = ("linear", "wsd", "greedy", "guards", "ours", "yoked", "sham")
TUNED_AS = {
    **dict.fromkeys(("guards", "ours", "as_shipped", "yoked", "sham", "pooled"), "linear"),
    "ours_wsd": "wsd",
}
"""Arms that are not tuned, and whose rate they take."""


def sham(factors: Sequence[float], plan: Sequence[float], seed: int) -> list[float]:
    """The moves of a run with their signs drawn anew.

    Args:
        factors: rates of the run, as factors of the peak.
        plan: what they would have been without feedback.
        seed: of the coin.

    A move is a maximal stretch of updates over which log(factor / plan) goes one way.
    """
    log = np.log(np.asarray(factors) / np.asarray(plan))
    d = np.diff(log, prepend=0.0)
    d[np.abs(d) < 1e-9] = 0.0
    sign = np.sign(d)
    starts = (sign != 0) & (sign != np.concatenate([[0.0], sign[:-1]]))
    coin = np.where(np.random.default_rng([seed, 5]).random(int(starts.sum())) < 0.5, -1.0, 1.0)
    move = np.cumsum(starts)  # 0 before the first
    signs = np.concatenate([[0.0], coin])[move]
    at, out = 0.0, []
    for step in np.abs(d) * signs:
        at = min(max(at + step, math.log(BOUNDS[0])), math.log(BOUNDS[1]))
        out.append(at)
    return (np.exp(out) * np.asarray(plan)).tolist()
