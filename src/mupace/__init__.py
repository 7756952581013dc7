"""mupace paces the learning rate of any PyTorch model."""
from __future__ import annotations

from mupace._version import __version__

__all__ = ["__version__"]
