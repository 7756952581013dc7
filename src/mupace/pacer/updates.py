"""Which optimizer updates were really applied, and what an optimizer has loaded; no compiler in the counting."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mupace.errors import MupaceWarning

F = TypeVar("F", bound=Callable[..., Any])
_MANY = 100  # optimizer steps between two looks, from which on a person is asked whether that is meant


class Landed:
    """Whether an optimizer update has been applied since the last look. It is the optimizer's step hook.

    A fused optimizer under a GradScaler runs its step, and its hooks, even when the scaler found an infinity; the
    scaler then leaves `found_inf` on the optimizer for the time of the step, and that is what is kept here.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls = 0
        self.sure = False
        self.found_inf: torch.Tensor | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        if "closure" in kwargs and _is_rehearsal(optimizer, kwargs):
            return
        found: torch.Tensor | None = getattr(optimizer, "found_inf", None)
        if found is None:
            self.sure = True
        else:  # applied if any of the steps was
            self.found_inf = found if self.found_inf is None else torch.minimum(self.found_inf, found)
        self.calls += 1

    def take(self) -> bool:
        """True when an update was applied; the next look starts afresh."""
        if not self.calls:
            return False
        calls, sure, found = self.calls, self.sure, self.found_inf
        self.calls, self.sure, self.found_inf = 0, False, None
        if calls >= _MANY:
            warn(
                f"{calls} optimizer steps since the last pacer.step(), which counts them as one update: call it once "
                "per update (Lightning: {'scheduler': pacer, 'interval': 'step'})"
            )
        return sure or (found is not None and not float(found))


def listen(pacer: Any, landed: Sequence[Landed], loaded: Callable[[], None]) -> None:
    """Hook the pacer's optimizers: their steps to `landed`, their loads to `loaded`; the hooks go when it goes."""

    def after(optimizer: torch.optim.Optimizer) -> None:
        loaded()

    for optimizer, mine in zip(pacer.optimizers, landed, strict=True):
        for handle in (
            optimizer.register_step_post_hook(mine),
            optimizer.register_load_state_dict_post_hook(after),
        ):
            weakref.finalize(pacer, handle.remove)


def _is_rehearsal(optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """A step that only creates optimizer state, as torch.distributed.checkpoint makes: zero gradients at rate 0."""
    groups = optimizer.param_groups
    if kwargs["closure"] is not None or any(float(g["lr"]) != 0.0 for g in groups):
        return False
    return not any(bool(p.grad.any()) for g in groups for p in g["params"] if p.grad is not None)


def untraced(function: F) -> F:
    """Keep torch.compile out of a function and all it calls, at no cost per call.

    What `torch.compiler.disable` does, without its wrapper (0.5 µs a call) and its import of the compiler.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # an older torch
        disabled: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def warn(message: str) -> None:
    """A `MupaceWarning` that points at the first line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mupace."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MupaceWarning, stacklevel=level)
