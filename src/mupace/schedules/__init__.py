"""Schedules: phases, shapes, curves, the named families over them, presets, importers."""

from mupace.schedules.build import schedule
from mupace.schedules.curve import Curve, Piece
from mupace.schedules.families import (
    constant,
    cosine,
    cyclic,
    exponential,
    inverse_sqrt,
    linear,
    noam,
    noam_peak,
    one_cycle,
    polynomial,
    power,
    restarts,
    sampled,
    step_decay,
    windows,
    wsd,
)
from mupace.schedules.phases import Phase, Sample, Schedule
from mupace.schedules.presets import PRESETS, Preset, batch_scaled, preset
from mupace.schedules.replan import branch, retotal
from mupace.schedules.shapes import SHAPES, Shape, register_shape

__all__ = [
    "PRESETS",
    "SHAPES",
    "Curve",
    "Phase",
    "Piece",
    "Preset",
    "Sample",
    "Schedule",
    "Shape",
    "batch_scaled",
    "branch",
    "constant",
    "cosine",
    "cyclic",
    "exponential",
    "inverse_sqrt",
    "linear",
    "noam",
    "noam_peak",
    "one_cycle",
    "polynomial",
    "power",
    "preset",
    "register_shape",
    "restarts",
    "retotal",
    "sampled",
    "schedule",
    "step_decay",
    "windows",
    "wsd",
]
