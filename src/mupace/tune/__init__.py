"""Tuning: what one measures before a long run."""
