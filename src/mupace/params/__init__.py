"""The parameter table: what every tensor of a model is for, where it stands, and how to name it."""

from __future__ import annotations

from mupace.params.roles import MODULES, ROLES, UNKNOWN, register_module
from mupace.params.select import matcher, matching
from mupace.params.table import AXES, PLACES, Param, ParamTable, param_table

__all__ = [
    "AXES",
    "MODULES",
    "PLACES",
    "ROLES",
    "UNKNOWN",
    "Param",
    "ParamTable",
    "matcher",
    "matching",
    "param_table",
    "register_module",
]
