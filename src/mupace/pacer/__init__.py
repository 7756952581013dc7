"""The pacer: from an applied update to the rates of the next one.

pacer.py      the object in the loop: clock, trainers' surface
clock.py      where the next update stands on an axis
updates.py    which optimizer updates were really applied
lanes.py      what a group is to the pacer, and the factors it takes
writer.py     the writes into the optimizer's groups
changes.py    extending, cutting, branching a plan while it runs
restore.py    saving and loading; comparing a saved plan with the present one
scaled.py     the plan of a parametrisation, as the pacer keeps it
ranks.py      what the processes of one run agree on
arguments.py  what a person gives, checked
"""

from mupace.pacer.lanes import GroupSpec
from mupace.pacer.pacer import Pacer

__all__ = ["GroupSpec", "Pacer"]
