"""The interface of teachers: who solves, shortens and ranks solutions. YAML chooses one by class path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class Usage:
    """What was asked of a model. A request counts alike whether it was paid for now or in an earlier run.

    Args:
        requests: number of questions.
        prompt_tokens, completion_tokens: as the model's server counts them; 0 for programs.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Query:
    """Ask for one solution.

    Args:
        problem: the problem.
        seed: of everything random about the solution.
        avoid: summaries of the methods that must not be used again.
    """

    problem: Problem
    seed: int
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """Ask for the next part of one thread of a debate.

    Args:
        problem: the problem.
        seed: of everything random about the part.
        own: what the thread has written so far, one text per finished round.
        others: the same of every other thread, by its number in the group.
        is_last: the thread must now come to its answer.
    """

    problem: Problem
    seed: int
    own: tuple[str, ...]
    others: Mapping[int, tuple[str, ...]]
    is_last: bool


@dataclass(frozen=True)
class Draft:
    """Ask for a shorter wording of a solution.

    Args:
        problem: the problem.
        seed: of everything random about the rewriting.
        steps: the solution, step by step.
        answer: its answer, which must stay.
        max_tokens: what the new wording must stay below.
    """

    problem: Problem
    seed: int
    steps: tuple[str, ...]
    answer: str
    max_tokens: int


@dataclass(frozen=True)
class Contest:
    """Ask which of several correct solutions is the most elegant.

    Args:
        problem: the problem.
        seed: of everything random about the ranking.
        texts: the solutions, in the order in which they are shown.
    """

    problem: Problem
    seed: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """One solution of a problem, or one part of a thread in a debate.

    Args:
        text: the reasoning, without the final answer.
        answer: the final answer; None if there is none (yet).
        method: short summary of the method.
        usage: what it took.
        error: why there is no solution; empty if there is one.
    """

    text: str
    answer: str | None
    method: str = ""
    usage: Usage = field(default_factory=Usage)
    error: str = ""


@dataclass(frozen=True)
class Ranking:
    """The solutions of a contest, most elegant first.

    Args:
        order: indices into ``Contest.texts``, each exactly once; empty if there is no ranking.
        usage: what it took.
        error: why there is no ranking; empty if there is one.
    """

    order: tuple[int, ...]
    usage: Usage = field(default_factory=Usage)
    error: str = ""


class Teacher(ABC):
    """Solves, shortens and ranks. All methods answer in order and never raise for a single question.

    Attributes:
        identity: what its answers depend on besides the questions; part of the keys under which stages are kept.
        note: what a reader of the data must know about it; stands in the data card.
        prompts: version and digest of each prompt template, by name; empty for programs.
    """

    identity: str
    note: str = ""
    prompts: Mapping[str, str] = {}

    @abstractmethod
    def solve(self, queries: Sequence[Query]) -> list[Solution]:
        """One solution per query; deterministic in the query, whatever else is asked with it."""

    def debate(self, turns: Sequence[Turn]) -> list[Solution]:
        """The next part of each thread. This default refuses."""
        return [self._refusal("debate")] * len(turns)

    def compress(self, drafts: Sequence[Draft]) -> list[Solution]:
        """A shorter wording of each draft. This default refuses."""
        return [self._refusal("rewrite solutions")] * len(drafts)

    def rank(self, contests: Sequence[Contest]) -> list[Ranking]:
        """An order of the solutions of each contest. This default puts fewer words first, then fewer characters."""
        return [Ranking(_shortest_first(contest.texts)) for contest in contests]

    def _refusal(self, what: str) -> Solution:
        return Solution("", None, error=f"{type(self).__name__} cannot {what}")


def _shortest_first(texts: Sequence[str]) -> tuple[int, ...]:
    def length(index: int) -> tuple[int, int, str]:
        return len(texts[index].split()), len(texts[index]), texts[index]  # the text itself: the order shown has no say

    return tuple(sorted(range(len(texts)), key=length))
