"""The structure of a model: its tensors by operator and size, and where multipliers can be folded in."""

from __future__ import annotations

from mupace.structure.compare import compare
from mupace.structure.model import Gain, Structure
from mupace.structure.reader import read
from mupace.structure.resize import resize
from mupace.structure.sizes import label_sizes, length, unexplained, with_sizes

__all__ = ["Gain", "Structure", "compare", "label_sizes", "length", "read", "resize", "unexplained", "with_sizes"]
