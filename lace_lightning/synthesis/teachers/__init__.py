"""Teachers: language models behind a chat interface, and programs."""

from lace_lightning.synthesis.teachers.arithmetic import ArithmeticTeacher
from lace_lightning.synthesis.teachers.language import LanguageTeacher
from lace_lightning.synthesis.teachers.puzzle import PuzzleTeacher

__all__ = ["ArithmeticTeacher", "LanguageTeacher", "PuzzleTeacher"]
