"""Symbolic verification of answers in processes that can be killed (LACE.md §5, §6)."""

from lace_lightning.verification.math_task import MathTask
from lace_lightning.verification.verifier import Verifier

__all__ = ["MathTask", "Verifier"]
