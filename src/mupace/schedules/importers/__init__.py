"""Exact importers: the schedule a framework would follow, as a `Curve` that gives every update the same value."""

from mupace.schedules.importers.from_function import from_function
from mupace.schedules.importers.from_megatron import from_megatron
from mupace.schedules.importers.from_optax import from_optax
from mupace.schedules.importers.from_timm import from_timm
from mupace.schedules.importers.from_torch import from_torch
from mupace.schedules.importers.from_torchtitan import from_torchtitan
from mupace.schedules.importers.from_transformers import from_transformers
from mupace.schedules.importers.parts import Imported

__all__ = [
    "Imported",
    "from_function",
    "from_megatron",
    "from_optax",
    "from_timm",
    "from_torch",
    "from_torchtitan",
    "from_transformers",
]
