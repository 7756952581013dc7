"""Hugging Face Trainer: the rates of all groups in its logs, a controller as a callback.

The Pacer goes in as `optimizers=(optimizer, pacer)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mupace.errors import StateError
from mupace.files import write_whole

if TYPE_CHECKING:
    from mupace.control import Controller
    from mupace.pacer import Pacer

STATE = "control.json"
"""What the controller keeps, in every checkpoint folder."""


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


class ControlCallback(TrainerCallback):  # type: ignore[misc]  # as above
    """Runs a `mupace.control.Controller` in a Trainer: `callbacks=[ControlCallback(controller)]`, beside the Pacer.

    The Trainer shows a callback its gradients after clipping, and its loss in the logs alone, where a NaN is replaced
    by an average (`logging_nan_inf_filter`): norms are those of clipped gradients, losses those of the last log, and a
    guard cannot leave out an update. What the controller keeps is written into every checkpoint as control.json, and
    read back with `load` before `train(resume_from_checkpoint=...)`.

    Args:
        controller: on the Trainer's pacer. Its asks: `stop` ends the training, `snapshot` saves, `rollback` is told as
            a stop (the Trainer cannot go back while it runs).
        on: what identifies the evaluation set.
    """

    def __init__(self, controller: Controller, on: str = "eval") -> None:
        self.controller, self.on = controller, on

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.controller.kept.seen < self.controller.pacer.clock.step:
            self.controller.begin_here()
        self.controller.open()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.step()
        self._asked(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        known = {k: logs[k] for k in ("loss", "grad_norm") if k in logs} if logs else {}
        self.controller.measured(**known)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        plain = {k.removeprefix("eval_"): v for k, v in metrics.items() if isinstance(v, (int, float))}
        self.controller.evaluated(self.on, **{k: v for k, v in plain.items() if k != "epoch" and "per_second" not in k})
        self._asked(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            text = json.dumps(self.controller.state_dict(), allow_nan=False)
            write_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, text, "controller state")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.close()

    def load(self, checkpoint: str | Path) -> None:
        """Take the controller's state from a Trainer's checkpoint folder, before `train(resume_from_checkpoint=...)`.

        Raises:
            StateError: it holds none, or one of another controller.
        """
        file = Path(checkpoint) / STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StateError(
                f"{file}: {error.strerror}; legal is a checkpoint that was saved with this callback"
            ) from None
        self.controller.load_state_dict(state)

    def _asked(self, control: Any) -> None:
        asks, self.controller.asks = self.controller.asks, []
        control.should_save |= any(ask == "snapshot" for ask, _ in asks)
        control.should_training_stop |= any(ask in ("stop", "rollback") for ask, _ in asks)
