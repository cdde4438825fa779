"""What is kept of an outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lace_lightning.decoding.group import Group
from lace_lightning.evaluation.inspection import Inspection
from lace_lightning.evaluation.method import Cost, Outcome, Passage
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem

ANSWERING = ("path", "revision", "merge")
"""Roles of passages that answer the problem; only these are judged."""


class Key(NamedTuple):
    """What an outcome is of; a store holds at most one of each."""

    benchmark: str
    method: str
    seed: int
    problem: str


Found = Literal["chosen right", "found but not chosen", "not found"]
"""How an outcome ended: the method's answer is right; a path was right and another (or none) was chosen; none was."""


@dataclass(frozen=True)
class JudgedPassage:
    """A passage with its verdict.

    Args:
        passage: what was written, its role and group.
        verdict: of its answer; None for roles that do not answer.
        inspection: the thread token by token; None where not recorded.
    """

    passage: Passage
    verdict: Verdict | None
    inspection: Inspection | None = None

    @property
    def gates(self) -> tuple[float, ...] | None:
        """Mean gate over lattice layers and channels at each of the thread's tokens; None where not recorded."""
        return None if self.inspection is None else self.inspection.gates

    @property
    def mean_gate(self) -> float | None:
        """Mean of the gates over tokens."""
        return sum(self.gates) / len(self.gates) if self.gates else None


@dataclass(frozen=True)
class JudgedOutcome:
    """A judged outcome of one method on one problem with one seed.

    Args:
        benchmark, method, seed: as the configuration names them.
        problem: the problem.
        passages: everything that was written, in order.
        chosen: index of the passage whose answer is the method's, or None.
        cost: of everything together.
        confidence: the method's belief in its answer, or None.
        notes: what else the method kept, JSON values.
        statistics: numbers of this outcome (:mod:`lace_lightning.evaluation.statistics`).
    """

    benchmark: str
    method: str
    seed: int
    problem: Problem
    passages: tuple[JudgedPassage, ...]
    chosen: int | None
    cost: Cost
    confidence: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return Key(self.benchmark, self.method, self.seed, self.problem.id)

    @property
    def paths(self) -> list[JudgedPassage]:
        """The full solutions: candidates for the answer."""
        return [passage for passage in self.passages if passage.passage.role == "path"]

    @property
    def is_right(self) -> bool:
        """Whether the method's answer is correct."""
        return self.chosen is not None and self.passages[self.chosen].verdict == Verdict.CORRECT

    @property
    def found(self) -> Found:
        if self.is_right:
            return "chosen right"
        is_any_right = any(passage.verdict == Verdict.CORRECT for passage in self.passages)
        return "found but not chosen" if is_any_right else "not found"

    def group(self) -> Group:
        """Its paths as one group of threads."""
        return Group(self.problem, tuple(path.passage.thread for path in self.paths), self.seed)


def make_judged(
    benchmark: str,
    method: str,
    seed: int,
    outcome: Outcome,
    verdicts: Sequence[Verdict | None],
    inspections: Sequence[Inspection | None],
) -> JudgedOutcome:
    """The record of an outcome, with one verdict and one inspection (or None) for each passage."""
    passages = tuple(map(JudgedPassage, outcome.passages, verdicts, inspections))
    return JudgedOutcome(
        benchmark, method, seed, outcome.problem, passages, outcome.chosen, outcome.cost, outcome.confidence,
        outcome.notes,
    )  # fmt: skip
