"""Hugging Face Trainer: the rates of all groups in its logs; the Pacer goes in as `optimizers=(optimizer, pacer)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from mupace.pacer import Pacer


class RatesCallback(TrainerCallback):  # type: ignore[misc]  # transformers is read without its types
    """Adds `learning_rate/<group>` to every training log: what the logged update used (the Trainer logs one group)."""

    def __init__(self, pacer: Pacer) -> None:
        self.pacer = pacer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "learning_rate" not in logs:
            return
        rates = {f"learning_rate/{n}": lr for n, lr in zip(self.pacer.names, self.pacer.used_lr(), strict=True)}
        logs.update(rates)
        state.log_history[-1].update(rates)


def log_rates(trainer: Any, pacer: Pacer) -> None:
    """Log every group's rate in `trainer`, in its log history and in every tracker.

    Trackers see the logs in the order of the callbacks, so this one goes to the front; `callbacks=[…]` would put it
    behind them.
    """
    trainer.callback_handler.callbacks.insert(0, RatesCallback(pacer))
