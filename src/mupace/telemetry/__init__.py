"""What a run measures of itself, at a share of a step's time that is bounded.

telemetry.py  the object in the loop: gradients(), the optimizer's hooks, observe(), collect()
tiers.py      how often what is measured
members.py    the tensors of the optimizers, each once, with its role
measure.py    the arithmetic on tensors: gradients, updates, second moments; nothing waits for a device
decode.py     from those sums to numbers by name
tally.py      what is gathered between two collects, and what outlives them: averages, ring, counters
ranks.py      the one reduction over the processes of a run
governor.py   the share of time, and longer intervals when it is too large
headroom.py   how far the last update could have gone: forward passes along it
averages.py   averaged weights for evaluations
sinks.py      a sink in a thread that can never hold up training
"""

from mupace.telemetry.averages import Averaged
from mupace.telemetry.governor import Change
from mupace.telemetry.headroom import Headroom, headroom
from mupace.telemetry.sinks import Background
from mupace.telemetry.telemetry import Collected, Telemetry
from mupace.telemetry.tiers import Tiers

__all__ = ["Averaged", "Background", "Change", "Collected", "Headroom", "Telemetry", "Tiers", "headroom"]
