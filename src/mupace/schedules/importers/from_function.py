"""Any learning rate that is a function of the update, as a table."""

from __future__ import annotations

from collections.abc import Callable

from mupace.schedules.importers.parts import Imported, bound, long_note, steps_horizon, tabled
from mupace.units import Horizon, Span


def from_function(lr: Callable[[int], float], *, total: Span | str | Horizon, source: str = "function") -> Imported:
    """The curve of lr(i), i = 0 … T: exact at every update, straight between them.

    The way in for frameworks whose schedule is a pure function (optax, OLMo-core, Composer, a lambda of your own).

    Args:
        lr: learning rate of update i.
        total: the length of the run in steps.

    Raises:
        ConfigError: a value that is negative or not finite.

    >>> imported = from_function(lambda i: 3e-4 * 0.5 ** (i // 10), total="30 steps")
    >>> imported.peaks, imported.curve(25)
    ((0.0003,), 0.25)
    """
    horizon, n = steps_horizon(total, source)
    parts = [tabled(lr, 0, n)]
    curve, peak = bound(parts, horizon, source, peak=0.0)
    return Imported(source=source, curves=(curve,), peaks=(peak,), notes=long_note(parts))
