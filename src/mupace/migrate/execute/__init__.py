"""Writing the target of a migration: out of core, whole or not at all, resumable."""

from mupace.migrate.execute.run import execute, least

__all__ = ["execute", "least"]
