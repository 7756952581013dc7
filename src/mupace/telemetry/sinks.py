"""A sink in a thread of its own, which can never hold up training."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

from mupace.errors import ConfigError
from mupace.pacer.updates import warn
from mupace.record import Sink
from mupace.units import is_number


class Background:
    """Hands rows to a sink in a daemon thread, through a queue with an end.

    `log` only puts a row into the queue. When it is full the oldest row is dropped and counted: the newest says more of
    a run than the oldest, and training never waits. A sink that raises is given up, with one warning at the next
    `log` or `close`; one that hangs holds its thread and nothing else.

    A row is copied at its first level when it is taken; what is inside (a tensor, a list) must not be written to later.

    Args:
        sink: where the rows go.
        capacity: rows the queue holds.
        timeout: seconds that `close` waits for what is in the queue, and for the sink's own close.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, sink: Sink, capacity: int = 1024, timeout: float = 5.0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(f"capacity={capacity!r}: legal is a number of rows >= 1")
        if not (is_number(timeout) and timeout >= 0):
            raise ConfigError(f"timeout={timeout!r}: legal is a number of seconds >= 0")
        self._timeout = float(timeout)
        self._queue = _Queue(sink, capacity)
        self._said = False
        self._thread = threading.Thread(target=self._queue.run, name=f"mupace {type(sink).__name__}", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._queue.stop)

    @property
    def dropped(self) -> int:
        """Rows that never reached the sink, whatever the reason."""
        return self._queue.dropped

    @property
    def failure(self) -> str | None:
        """What the sink raised, None while it works."""
        return self._queue.failure

    def log(self, row: Mapping[str, Any], /) -> None:
        """Take one row; returns at once."""
        self._queue.put(dict(row))
        self._complain()

    def close(self) -> None:
        """Hand over what is left and close the sink, within `timeout`; what then remains is dropped and said."""
        left = self._queue.finish(self._thread, self._timeout)
        self._complain()
        if left is not None and not self._said:
            self._said = True
            warn(f"sink {self._queue.label} did not finish in {self._timeout:g} s: {left} rows were dropped")

    def _complain(self) -> None:
        if self._queue.failure is not None and not self._said:
            self._said = True
            warn(f"sink {self._queue.label} failed and was dropped: {self._queue.failure}")


class _Queue:
    """What the thread and the caller share; it does not know the `Background`, so that may be collected."""

    def __init__(self, sink: Sink, capacity: int) -> None:
        self.sink, self.capacity, self.label = sink, capacity, type(sink).__name__
        self.rows: deque[dict[str, Any]] = deque()
        self.dropped = 0
        self.failure: str | None = None
        self.closing = False
        self.busy = False
        self.changed = threading.Condition()

    def put(self, row: dict[str, Any]) -> None:
        with self.changed:
            if self.closing or self.failure is not None:
                self.dropped += 1
                return
            if len(self.rows) >= self.capacity:
                self.rows.popleft()
                self.dropped += 1
            self.rows.append(row)
            self.changed.notify()

    def run(self) -> None:
        """The thread: one row after the other, the sink's close at the end. The lock is never held in the sink."""
        try:
            while (row := self._next()) is not None:
                self.sink.log(row)
            self.sink.close()
        except BaseException as error:  # a tracker must never end a training run
            self._give_up(error)

    def _next(self) -> dict[str, Any] | None:
        with self.changed:
            self.busy = False
            while not self.rows and not self.closing:
                self.changed.wait()
            if not self.rows:
                return None
            self.busy = True
            return self.rows.popleft()

    def _give_up(self, error: BaseException) -> None:
        with self.changed:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.dropped += len(self.rows) + self.busy
            self.busy = False
            self.rows.clear()

    def stop(self) -> None:
        """Take no more rows; the thread ends after those it has."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def finish(self, thread: threading.Thread, timeout: float) -> int | None:
        """Wait for the thread; how many rows were given up, None when it has ended."""
        until = time.monotonic() + timeout
        self.stop()
        thread.join(max(0.0, until - time.monotonic()))
        if not thread.is_alive():
            return None
        with self.changed:
            left = len(self.rows)
            self.rows.clear()  # should the sink wake up, it finds nothing more to do
            self.dropped += left
            return left + self.busy
