"""Verification of answers, symbolic and other, in processes that can be killed (LACE.md §5, §6)."""

from lace_lightning.verification.math_task import MathTask
from lace_lightning.verification.reference import Kind, Reference, reference_of
from lace_lightning.verification.verifier import Verifier

__all__ = ["Kind", "MathTask", "Reference", "Verifier", "reference_of"]
