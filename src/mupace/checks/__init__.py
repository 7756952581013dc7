"""The pre-flight list: what goes wrong silently in a training run, looked at before it starts."""

from mupace.checks.report import Item, Report
from mupace.checks.run import CONTROL_ITEMS, ITEMS, PLAN_ITEMS, check_config, preflight

__all__ = ["CONTROL_ITEMS", "ITEMS", "PLAN_ITEMS", "Item", "Report", "check_config", "preflight"]
