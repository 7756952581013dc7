"""The structure of a model: its tensors by operator and size, and where multipliers can be folded in."""

from __future__ import annotations

from mupace.structure.model import Gain, Structure
from mupace.structure.reader import read

__all__ = ["Gain", "Structure", "read"]
