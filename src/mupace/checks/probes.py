"""Items that try something on a twin: a skipped update, a save and a load, one advance per update; and the ranks."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from mupace.checks.numbers import amount, plural, rate
from mupace.checks.rates import Rates
from mupace.checks.report import Finding, bad, na, ok
from mupace.checks.subject import Subject
from mupace.checks.twin import Twin, quiet
from mupace.pacer import Pacer

OURS = "pace it with mupace.Pacer, which advances once per applied update"
_NEXT = 3  # updates that are compared after a load


def skipped(s: Subject) -> Finding:
    """An update that a GradScaler skips does not advance the schedule: an infinity is put into real gradients."""
    if s.pacer is None and not s.scaling:
        return na("no GradScaler is used (scaler=): no update can be skipped")
    if s.wrapped:
        return na("Accelerate's wrapper steps the scheduler only where its optimizer stepped; it is not tried here")
    try:
        clock, lr = _with_infinity(s.twin())
    except Exception as error:  # an optimizer that needs a closure, or a device of its own
        return na(f"{type(s.optimizers[0]).__name__} could not be tried with a GradScaler: {_line(error)}")
    evidence = (
        f"real {type(s.optimizers[0]).__name__} and GradScaler: after a good update at {clock[0]} (lr {rate(lr[0])}), "
        f"after an infinite gradient at {clock[1]} (lr {rate(lr[1])}), after a good one at {clock[2]}"
    )
    if clock[1] != clock[0] or lr[1] != lr[0]:
        return bad(
            f"{evidence}: the skipped update advanced it",
            f"{OURS} (a guard in your loop on scaler.get_scale() also serves, but cannot be seen from here)",
        )
    if clock[2] != clock[0] + 1:
        return bad(f"{evidence}: a good update did not advance it", OURS)
    return ok(evidence)


def _with_infinity(double: Twin) -> tuple[list[int], list[float]]:
    """The clock and the first rate after a good, a skipped and a good update."""
    scaler = torch.amp.GradScaler(double.parameters[0].device.type)
    clock, lr = [], []
    with quiet():
        for gradient in (1.0, float("inf"), 1.0):
            double.update(scaler, gradient)
            double.scheduler.step()
            clock.append(int(double.scheduler.last_epoch))
            lr.append(double.rates[0])
    return clock, lr


def resume(s: Subject) -> Finding:
    """Saved by torch.save, read with weights_only, loaded into fresh objects: the next rates are the same."""
    if not s.resume:
        return na("resume=False: this run is never continued")
    if isinstance(s.rates, str):
        return na(s.rates)
    at = _positions(s, s.rates)
    try:
        saves = [(p, _saved(double), _onward(double)) for p, double in _along(s, at)]
    except Exception as error:  # a foreign state may refuse in any way
        return bad(
            f"the state does not pass torch.save and torch.load(weights_only=True): {_line(error)}",
            "keep numbers, text, lists and dicts in the state (lr=float(lr), where it came from numpy)",
        )
    for position, state, expected in saves:
        for order in (("optimizers", "scheduler"), ("scheduler", "optimizers")):
            found = _onward(_loaded(s, state, order))[: len(expected)]
            if found != expected:
                return _jumped(s, position, order[0], found, expected)
    return ok(
        f"saved and loaded at updates {', '.join(amount(p) for p in at)}, optimizer first and scheduler first: the "
        "next rates are the uninterrupted ones to the last bit"
    )


def _positions(s: Subject, rates: Rates) -> list[int]:
    """Near the start, at the phase edges, in the middle, before the end."""
    if _measured(s):
        return [_NEXT]
    n = len(rates.steps) if s.pacer is None else int(rates.steps[-1]) + 1
    edges = [] if s.curve is None else [int(edge) for edge, _, _ in s.curve.edges()[1:-1]]
    wanted = {1, n // 2, n - _NEXT, *edges, *(edge + 1 for edge in edges)}
    if s.pacer is None:
        wanted.add(int(np.argmax(rates.values[:, 0])))
    return sorted(p for p in wanted if 0 < p < n) or [1]


def _measured(s: Subject) -> bool:
    """Whether the position is measured in seconds: what comes after the next rate is then not known beforehand."""
    return s.curve is not None and s.curve.horizon.axis == "second"


def _along(s: Subject, positions: Iterable[int]) -> Iterator[tuple[int, Twin]]:
    """A twin at each of these positions; what is done to it does not reach the next."""
    for position in positions:
        double = s.twin()
        with quiet():
            if isinstance(double.scheduler, Pacer) and not _measured(s):
                double.scheduler.seek(step=position)
            else:
                for _ in range(position):
                    _one(double)
        yield position, double


def _one(double: Twin) -> None:
    """One update and one call; a foreign scheduler needs no real update to move."""
    if isinstance(double.scheduler, Pacer):
        double.update()
    double.scheduler.step()


def _saved(double: Twin) -> dict[str, Any]:
    file = io.BytesIO()
    state = {"optimizers": [o.state_dict() for o in double.optimizers], "scheduler": double.scheduler.state_dict()}
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _loaded(s: Subject, state: dict[str, Any], order: Iterable[str]) -> Twin:
    """Fresh objects that have taken the state in, as a new process would make them."""
    double = s.twin()
    with quiet():
        if isinstance(double.scheduler, Pacer):
            double.scheduler.seek(step=0)
        for name in order:
            if name == "scheduler":
                double.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
            else:
                for optimizer, saved in zip(double.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
    return double


def _onward(double: Twin) -> list[list[float]]:
    """The rates of the next updates, as the optimizers hold them."""
    rows = [double.rates]
    measured = isinstance(double.scheduler, Pacer) and double.scheduler.curve.horizon.axis == "second"
    with quiet():
        for _ in range(0 if measured else _NEXT - 1):
            try:
                _one(double)
            except Exception:  # a scheduler that ends, as OneCycleLR does
                break
            rows.append(double.rates)
    return rows


def _jumped(s: Subject, position: int, order: str, found: list[Any], expected: list[Any]) -> Finding:
    i, g = next((i, g) for i, row in enumerate(expected) for g, lr in enumerate(row) if found[i][g] != lr)
    return bad(
        f"saved at update {amount(position)} and loaded ({order} first), update {amount(position + i)} has "
        f"lr={rate(found[i][g])}; uninterrupted it has {rate(expected[i][g])}",
        f"make state_dict and load_state_dict of {s.kind} carry its whole position, or pace with mupace.Pacer",
    )


def ranks(s: Subject) -> Finding:
    """All processes have the same plan: groups, lengths and rates."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return na("one process: torch.distributed is not initialised")
    if dist.get_world_size() == 1:
        return na("one process: the world has size 1")
    mine = _plan(s)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    differ = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if not differ:
        return ok(f"{len(everyone)} ranks: the same {plural(len(mine['groups']), 'group')}, length and rates")
    rank = differ[0]
    what = next(key for key in mine if everyone[rank][key] != everyone[0][key])
    return bad(
        f"rank {rank} has other {what} than rank 0: {everyone[rank][what]!s:.60} against {everyone[0][what]!s:.60}",
        "build the optimizer and the schedule from the same config on every rank (environment variables, data length)",
    )


def _plan(s: Subject) -> dict[str, Any]:
    """What has to be the same on every rank, the telling things first."""
    names = [str(g.get("name", f"group{i}")) for i, g in enumerate(s.groups)]
    if isinstance(s.rates, str):
        return {"groups": names, "length": s.length}
    return {
        "groups": names,
        "length": s.length,
        "highest rates": s.rates.highest.tolist(),
        "rates (sha256)": hashlib.sha256(np.ascontiguousarray(s.rates.values).tobytes()).hexdigest(),
    }


def advance(s: Subject) -> Finding:
    """One optimizer update moves the schedule by one, in the optimizer that is stepped."""
    if any(a is not b for a, b in zip(s.paced, s.optimizers, strict=False)) or len(s.paced) != len(s.optimizers):
        return bad(
            f"{s.kind} does not write to the same optimizer objects as given: its rates never arrive",
            "build the scheduler on the optimizers that are stepped, after every wrapper has replaced them",
        )
    if s.pacer is not None:
        return _advance_of_pacer(s)
    if s.calls_per_update is None:
        return na(f"calls_per_update= is not given: whether {s.kind}.step() runs once per update is not known")
    if s.calls_per_update > 1:
        n = s.calls_per_update
        where = "Accelerate's wrapper, once per process" if s.wrapped else "scheduler.step()"
        return bad(
            f"{plural(n, 'call')} per update ({where}): the schedule runs {n} times as fast as the run",
            f"call it once per update, or {OURS}" if not s.wrapped else f"use split_batches=True, or {OURS}",
        )
    return ok("1 call per update, as told")


def _advance_of_pacer(s: Subject) -> Finding:
    double = s.twin()
    before = int(double.scheduler.last_epoch)
    calls = max(3, s.calls_per_update or 1, s.accumulate)
    try:
        with quiet():
            double.scheduler.step()
            idle = int(double.scheduler.last_epoch) - before
            double.update()
            for _ in range(calls):
                double.scheduler.step()
    except Exception as error:  # an optimizer that needs a closure
        return na(f"{type(s.optimizers[0]).__name__} could not be tried: {_line(error)}")
    moved = int(double.scheduler.last_epoch) - before - idle
    evidence = f"a call without an update moves it by {idle}, an update and {plural(calls, 'call')} by {moved}"
    return ok(evidence) if (idle, moved) == (0, 1) else bad(evidence, f"step() of {s.kind} must count updates: {OURS}")


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:120]
