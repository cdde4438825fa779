"""A puzzle's own solver as teacher: no model, no network, no cost."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from lace_lightning.synthesis.rows import describe, digest
from lace_lightning.synthesis.teacher import Query, Solution, Teacher
from lace_lightning.traces.schema import Problem, TraceThread


class SolvablePuzzle(Protocol):
    """A puzzle whose solver writes single threads; :class:`~lace_lightning.puzzles.Countdown` is one."""

    def attempt(self, problem: Problem, avoid: Sequence[str], rng: Random) -> TraceThread | None:
        """One thread that leaves out the strategies in ``avoid``; None if no other is left."""
        ...


class PuzzleTeacher(Teacher):
    """Asks the puzzle's solver for one thread at a time; the thread's strategy is its method.

    Threads explore blindly: whether one hits is luck, as it is for the model. Rankings put fewer words first.

    Args:
        puzzle: the puzzle, with the same settings as the pipeline's task.
    """

    note = "Programmatic: threads are written by the puzzle's solver, not by a language model."

    def __init__(self, puzzle: SolvablePuzzle) -> None:
        self.puzzle = puzzle
        self.identity = f"PuzzleTeacher({type(puzzle).__name__} {digest(describe(puzzle))[:12]})"

    def solve(self, queries: Sequence[Query]) -> list[Solution]:
        return [self._solve(query) for query in queries]

    def _solve(self, query: Query) -> Solution:
        thread = self.puzzle.attempt(query.problem, query.avoid, Random(query.seed))
        if thread is None:
            return Solution("", None, error="no method left")
        return Solution(thread.text, thread.answer, thread.strategy)
