"""What surrounds the loop of a run: seeds and signals."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mupace.trainer.loop import Trainer


def seed_all(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


@contextmanager
def signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGINT end the run after the present update, with a checkpoint; a second one ends it at once."""

    def ask(number: int, frame: object) -> None:
        trainer.stop = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    try:
        old = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the embedding program owns the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
