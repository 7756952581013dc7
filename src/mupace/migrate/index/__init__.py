"""Reading checkpoints without loading them."""

from mupace.migrate.index.digests import digest
from mupace.migrate.index.model import DTYPES, FLOATS, Entry, Group, Index, OptimizerIndex, Piece
from mupace.migrate.index.open import index
from mupace.migrate.index.read import read, read_rows
from mupace.migrate.index.show import shown

__all__ = [
    "DTYPES",
    "FLOATS",
    "Entry",
    "Group",
    "Index",
    "OptimizerIndex",
    "Piece",
    "digest",
    "index",
    "read",
    "read_rows",
    "shown",
]
