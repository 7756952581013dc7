"""A model that keeps learning while it is used, and learns faster while the world has just changed.

    python examples/online.py

A stream of samples is predicted, then learned from. At update 2000 the relation behind it changes. The monitor watches
the error of the predictions; when it has risen beyond its own noise, the learning rate goes up within the bounds, and
back to where it was when the error is well again. Printed: how long that takes with and without it.
"""

from __future__ import annotations

import statistics

import torch

import mupace
from mupace.control import Controller
from mupace.policies.monitor import MonitorPolicy

UPDATES, DRIFT, BATCH, INPUTS = 5000, 2000, 8, 16


def world(seed: int) -> tuple[torch.Generator, torch.Tensor, torch.Tensor]:
    """Samples' generator, and the weights of the relation before and after the change."""
    generator = torch.Generator().manual_seed(seed)
    return generator, torch.randn(INPUTS, generator=generator), torch.randn(INPUTS, generator=generator)


def run(seed: int, policies: list[MonitorPolicy]) -> tuple[list[float], list[str]]:
    """(squared error of every update's predictions, what the controller said)."""
    generator, before, after = world(seed)
    model = torch.nn.Linear(INPUTS, 1)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    pacer = mupace.Pacer(optimizer, mupace.schedule("hold", total=f"{UPDATES} steps"))
    said: list[str] = []
    control = Controller(pacer, policies=policies, mode="act", bounds=(0.25, 4.0), change=(0.25, 4.0), tell=said.append)
    errors: list[float] = []
    for update in range(UPDATES):
        x = torch.randn(BATCH, INPUTS, generator=generator)
        truth = x @ (before if update < DRIFT else after)
        y = truth + 0.5 * torch.randn(BATCH, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x).squeeze(1), y)  # predicted before it is learned from
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pacer.step()
        errors.append(float(loss.detach()))
        if update % control.options.every == control.options.every - 1:
            control.measured(error=statistics.fmean(errors[-control.options.every :]))
        control.step(loss=loss)
    return errors, said


def recovery(errors: list[float], over: int = 50) -> int:
    """Updates after the change until the mean error over 50 updates is within a tenth of what it was before it."""
    level = statistics.fmean(errors[DRIFT - 500 : DRIFT])
    for end in range(DRIFT + over, len(errors)):
        if statistics.fmean(errors[end - over : end]) < 1.1 * level:
            return end - DRIFT
    return len(errors) - DRIFT


def main() -> None:
    times: dict[str, list[int]] = {"without": [], "with": []}
    for seed in range(3):
        for name, policies in (("without", []), ("with", [MonitorPolicy(metric="error", up=4.0, window=32)])):
            errors, said = run(seed, policies)
            times[name].append(recovery(errors))
            if seed == 0:
                print(*said, sep="\n", end="\n" if said else "")
    for name, found in times.items():
        print(f"{name} the monitor: recovered after {statistics.median(found):.0f} updates (median of {sorted(found)})")


if __name__ == "__main__":
    main()
