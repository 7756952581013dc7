"""The package mup of microsoft and mupace, tensor by tensor, on a model that both can express.

The model is mup_models/plain.py; mup_models/with_mup.py is the same file as the README of mup asks for it. The files
call_*.py beside call_plain.py are what each package needs where model and optimizer are made. Compared are

    lines           how many a user changes, by difflib
    numbers         the ratios of lr, weight decay and eps to the base's, and the initial standard deviations
    one run         the losses of the same weights under both
    coordinates     the verdict of one coordinate check on both, and on plain torch as the control

The package is an oracle here and no dependency: where it cannot be imported it is taken from --site or $MUP_SITE, or
else installed into the cache directory without its dependencies.

    python benchmarks/beside_mup.py                 # about a minute of one core
    python benchmarks/beside_mup.py --no-training   # lines and numbers alone

Exit code 1 when the ratios of lr or the verdicts differ, or the control passes.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from duplication import widen

from mupace.optimizers import optimizer
from mupace.scaling import Plan, parametrize
from mupace.scaling.rules import rule_set
from mupace.structure import read
from mupace.tune.coordinates import text_batches
from mupace.tune.flatness import PASSES, Verdict, passed, verdicts, worst
from mupace.tune.probes import Probe, branch_paths
from mupace.tune.readings import Curve, Run
from mupace.tune.sizes import Size

HERE = Path(__file__).parent
MODELS = HERE / "mup_models"
PINNED = "mup==1.0.0"
RULES: dict[str, Any] = {"rules": "mup_multiplier", "explicit": ("logits",)}  # as theirs: the multiplier in the forward
BASE = (32, 64)  # width, feed-forward
EVEN, UNEVEN = (128, 256), (128, 128)
WIDTHS, SEEDS, UPDATES, LR = (1, 2, 4, 8), (0, 1, 2), 6, 2**-6
DECAY = {"adamw": 0.1, "adam": 1e-3}
NONE = 1e-30  # an eps that changes nothing in float64
IDS = torch.zeros(1, 8, dtype=torch.long)
Call = Callable[[int, int, float], tuple[torch.nn.Module, torch.optim.Optimizer]]


def make_importable(site: str | None, cache: Path | None = None) -> None:
    """Find the package, or install it into a folder; SubprocessError without a network."""
    if importlib.util.find_spec("mup") is not None:
        return
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mupace" / PINNED
    folder = Path(site or os.environ.get("MUP_SITE") or cache or kept)
    if not (folder / "mup").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--retries", "1", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, PINNED], check=True, timeout=90, capture_output=True)
    sys.path.append(str(folder))


# Lines


def code(path: Path) -> list[str]:
    """The lines of a file without its docstring and blank ones."""
    text = path.read_text(encoding="utf-8")
    first = ast.parse(text).body[0]
    return [line for line in text.splitlines()[first.end_lineno :] if line.strip()]


def changed(before: str, after: str) -> int:
    """How many lines a user changes, removes or adds."""
    steps = difflib.SequenceMatcher(a=code(MODELS / before), b=code(MODELS / after), autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in steps if tag != "equal")


def lines() -> str:
    calls = {name: changed("call_plain.py", f"call_{name}.py") for name in ("mup", "mupace")}
    model = changed("plain.py", "with_mup.py")
    return (
        f"model lines a user must change: theirs {model}, ours 0\n"
        f"lines where model and optimizer are made: theirs {calls['mup']}, ours {calls['mupace']}"
    )


# Numbers


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number of one tensor that is not the same."""

    name: str
    what: str
    theirs: float
    ours: float


def plain_model(width: int, hidden: int) -> torch.nn.Module:
    return import_module("mup_models.plain").GPT(width, hidden)


def mup_model(width: int, hidden: int) -> torch.nn.Module:
    """As call_mup.py makes it."""
    model: torch.nn.Module = import_module("mup_models.call_mup").made(width, hidden, 1.0)[0]
    return model


def plan_of(model: torch.nn.Module, name: str = "adamw", **rules: Any) -> Plan:
    return parametrize(model, base=plain_model(*BASE), optimizer=name, inputs=(IDS,), **(rules or RULES))


def their_numbers(name: str, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Tensor to the numbers of its param group in mup's optimizer, made with 1 for every number."""
    mup, model = import_module("mup"), mup_model(*size)
    make = {"adamw": mup.MuAdamW, "adam": mup.MuAdam, "sgd": mup.MuSGD}[name]
    built = make(model.parameters(), lr=1.0, weight_decay=1.0, **({} if name == "sgd" else {"eps": 1.0}))
    return _by_tensor(model, built.param_groups)


def our_numbers(name: str, size: tuple[int, int], **rules: Any) -> dict[str, dict[str, float]]:
    """The same of a plan."""
    model = plain_model(*size)
    groups = plan_of(model, name, **rules).groups(lr=1.0, weight_decay=1.0, eps=1.0, no_decay=())
    return _by_tensor(model, optimizer(name, groups)[0].param_groups)


def _by_tensor(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = ("lr", "weight_decay", "eps")
    return {names[id(p)]: {key: g[key] for key in wanted if key in g} for g in groups for p in g["params"]}


def differences(name: str, size: tuple[int, int], **rules: Any) -> list[Difference]:
    """Every number that differs between the two."""
    theirs, ours = their_numbers(name, size), our_numbers(name, size, **rules)
    assert theirs.keys() == ours.keys()
    return [
        Difference(name=tensor, what=key, theirs=value, ours=ours[tensor][key])
        for tensor, numbers in theirs.items()
        for key, value in numbers.items()
        if abs(value - ours[tensor][key]) > 1e-12 * value
    ]


def numbers() -> tuple[str, bool]:
    """The comparison as text, and whether every ratio of lr is the same."""
    rows, same = [], True
    for name in ("adamw", "adam", "sgd"):
        for label, size in (("×4", EVEN), ("width ×4, feed-forward ×2", UNEVEN)):
            found = differences(name, size)
            same &= not any(d.what == "lr" for d in found)
            keys = ("lr", "weight_decay") + (() if name == "sgd" else ("eps",))
            count = sum(1 for _ in plain_model(*BASE).parameters())
            cells = [f"{key} {_said([d for d in found if d.what == key], count)}" for key in keys]
            rows.append(f"{name:5}  {label:25}  {'; '.join(cells)}")
    return "\n".join(rows), same


def _said(found: list[Difference], count: int) -> str:
    if not found:
        return f"same for {count} of {count} tensors"
    widest = max(found, key=lambda d: abs(np.log(d.theirs / d.ours)))
    return f"differs for {len(found)} of {count}, as {widest.name} (theirs ×{widest.theirs:g}, ours ×{widest.ours:g})"


def deviations(size: tuple[int, int]) -> Iterator[tuple[str, float, float, float]]:
    """Tensor, initial standard deviation of theirs and ours, and the standard error of their ratio."""
    torch.manual_seed(0)
    theirs, ours = mup_model(*size), plain_model(*size)
    plan_of(ours)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        one, other = float(a.detach().std()), float(b.detach().std())
        if other > 0:
            yield name, one, other, a.numel() ** -0.5


def initial(size: tuple[int, int]) -> tuple[str, bool]:
    """The largest difference of the initial standard deviations, in standard errors."""
    rows = list(deviations(size))
    far = [abs(np.log(a / b)) / error for _, a, b, error in rows]
    worst_one = rows[int(np.argmax(far))]
    ratio, text = worst_one[1] / worst_one[2], f"initial standard deviations of {len(rows)} random tensors"
    said = f"the largest difference is {max(far):.1f} standard errors ({worst_one[0]}, ratio {ratio:.4f})"
    return f"{text}: {said}", max(far) < 5


# One run


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def trained(model: torch.nn.Module, steps: torch.optim.Optimizer, updates: int) -> list[float]:
    found = []
    for batch in batches(updates):
        loss = loss_of(model, batch)
        loss.backward()
        steps.step()
        steps.zero_grad()
        found.append(float(loss.detach()))
    return found


def batches(n: int) -> list[torch.Tensor]:
    return text_batches(n, batch=4, seq_len=import_module("mup_models.plain").LENGTH)


def head_runs(name: str, dim: int) -> int:
    """Heads are repeated whole: rows of q, k and v, columns of o."""
    heads: int = import_module("mup_models.plain").HEAD
    rows = dim == 0 and any(f"attention.{part}." in name for part in "qkv")
    return heads if rows or (dim == 1 and "attention.o." in name) else 1


def runs(name: str, eps: float, *, duplicate: bool, updates: int = 25) -> tuple[list[float], list[float], list[float]]:
    """Losses of a base, and of a model four times as wide under theirs and under ours, in float64.

    With `duplicate` both wide models compute what the base does; else they share weights of their own.
    """
    mup = import_module("mup")
    torch.manual_seed(0)
    small, theirs, ours = plain_model(*BASE).double(), mup_model(*EVEN).double(), plain_model(*EVEN).double()
    plan = plan_of(ours, name)
    if duplicate:
        widen(small, theirs, head_runs, undivided=("tokens", "positions", "readout"))
    ours.load_state_dict(theirs.state_dict())
    settings: dict[str, float] = {"lr": 2**-8, "weight_decay": DECAY[name], "eps": eps}
    stock, scaled = (torch.optim.AdamW, mup.MuAdamW) if name == "adamw" else (torch.optim.Adam, mup.MuAdam)
    groups = plan.groups(**settings, no_decay=())
    steps = (stock(small.parameters(), **settings), scaled(theirs.parameters(), **settings), stock(groups))
    a, b, c = (trained(*pair, updates) for pair in zip((small, theirs, ours), steps, strict=True))
    return a, b, c


def gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def one_run() -> str:
    """What the numbers do that the two scale differently: eps, and the decay of Adam."""
    _, theirs, ours = runs("adamw", NONE, duplicate=False)
    rows = [f"AdamW, no eps, the same weights: in 25 updates the losses of both differ by {gap(theirs, ours):.1e}"]
    for name, eps in (("adamw", 1e-8), ("adamw", 1e-6), ("adamw", 1e-4), ("adam", NONE)):
        small, theirs, ours = runs(name, eps, duplicate=True)
        given = f"AdamW, eps {eps:g}" if name == "adamw" else f"Adam, no eps, weight decay {DECAY[name]:g}"
        rows.append(
            f"{given}, duplicated ×4: in 25 updates the loss departs from the base's by {gap(small, theirs):.1e} "
            f"under theirs, {gap(small, ours):.1e} under ours"
        )
    return "\n".join(rows)


# Coordinates


def measured(call: Call, multiple: int, seed: int) -> Run:
    """Train one width with what a call made, and read it after every update."""
    width, hidden = (multiple * n for n in BASE)
    torch.manual_seed(seed)
    model, steps = call(width, hidden, LR)
    reference = plain_model(width, hidden)
    plan, adds = plan_of(reference), branch_paths(read(plain_model(width, hidden), inputs=(IDS,)))
    data = batches(UPDATES)
    probe = Probe(model, plan, adds, lambda: model(data[0][:, :-1]))
    readings, losses = [probe.read()], []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
        readings.append(probe.read())
    places: dict[str, list[str]] = {}
    for path in readings[0]:
        places.setdefault(probe.spots[path].path, []).append(path)
    curves = {name: _curve(probe.spots[paths[0]].kind, readings, paths) for name, paths in places.items()}
    return Run(size=Size(width=multiple), seed=seed, losses=tuple(losses), width=curves, depth={})


def _curve(kind: str, readings: list[Any], paths: list[str]) -> Curve:
    """All blocks together: quadratic means."""
    rms, change = (
        tuple(float(np.sqrt(np.mean([getattr(r[path], key) ** 2 for path in paths]))) for r in readings)
        for key in ("rms", "change")
    )
    return Curve(kind=kind, rms=rms, mean=rms, change=change)


def coordinates(name: str) -> tuple[Verdict, ...]:
    """Every slope of one package, judged by what the rules promise."""
    call = import_module(f"mup_models.call_{name}").made
    found = [measured(call, multiple, seed) for multiple in WIDTHS for seed in SEEDS]
    return verdicts(found, "width", rule_set("mup_multiplier"), statistic="rms", bound=0.1)


def verdict_line(name: str, found: tuple[Verdict, ...]) -> str:
    outcome = "passes" if passed(found) else "FAILS"
    good = sum(v.status == PASSES for v in found)
    return f"{name:7}  {outcome}: {good} of {len(found)} slopes as expected; the worst is {worst(found)}"


def checked() -> tuple[str, bool]:
    """The verdicts as text, and whether they are as they must be."""
    found = {name: coordinates(name) for name in ("mup", "mupace", "plain")}
    statuses = [[v.status for v in found[name]] for name in ("mup", "mupace")]
    agreed = sum(a == b for a, b in zip(*statuses, strict=True))
    apart = max(
        abs(a.slope.value - b.slope.value)
        for a, b in zip(found["mup"], found["mupace"], strict=True)
        if a.slope is not None and b.slope is not None
    )
    same = passed(found["mup"]) == passed(found["mupace"])
    rows = [verdict_line(name, verdict) for name, verdict in found.items()]
    rows.append(
        f"verdicts of mup and mupace: {'same' if same else 'DIFFERENT'}; {agreed} of {len(statuses[0])} slopes judged "
        f"the same, at most {apart:.2f} apart"
    )
    return "\n".join(rows), same and not passed(found["plain"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", help="a folder that mup is installed in")
    parser.add_argument("--no-training", action="store_true", help="lines and numbers alone; nothing is kept")
    given = parser.parse_args()
    make_importable(given.site)
    torch.set_num_threads(1)
    table, lr_same = numbers()
    deviation, deviation_same = initial(EVEN)
    texts = [f"== {PINNED} beside mupace, a GPT of two blocks, base {BASE[0]} wide", lines(), table, deviation]
    fine = lr_same and deviation_same
    if not given.no_training:
        verdict, agree = checked()
        fine &= agree
        texts += [one_run(), verdict]
    texts.append("lr ratios and verdicts are the same" if fine else "MISSED: see above")
    print("\n\n".join(texts))
    if not given.no_training:
        (HERE / "results" / "beside_mup.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
