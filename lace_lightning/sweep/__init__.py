"""Sweeps: many trials of a chain of stages, one table (docs/sweeps.md)."""
