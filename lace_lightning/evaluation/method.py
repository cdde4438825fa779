"""The interface of evaluation: a policy that writes threads, and methods that spend a budget of them on a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.tasks import Task
from lace_lightning.traces.schema import Problem


@dataclass(frozen=True)
class Cost:
    """What a call, or a method on a problem, took.

    Args:
        prompt_tokens: tokens read before the first column, the prompt of a group once.
        tokens: tokens written, those of the environment included.
        columns: decoding steps one after the other: the latency that no hardware removes.
        seconds: wall-clock seconds; of a batch, each problem's even share.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    columns: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, group: Group, seconds: float, prompt_tokens: int = 0) -> Cost:
        """What writing a group took."""
        columns = max((thread.columns[-1] + 1 for thread in group.threads if thread.columns), default=0)
        return cls(prompt_tokens, sum(thread.num_tokens for thread in group.threads), columns, seconds)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.prompt_tokens + other.prompt_tokens,
            self.tokens + other.tokens,
            self.columns + other.columns,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Played:
    """The groups of one call with the cost of each."""

    groups: list[Group]
    costs: list[Cost]


class Policy(Protocol):
    """A model with its tokenizer and the task that it plays."""

    task: Task
    num_threads: int

    def play(
        self,
        problems: Sequence[Problem],
        seeds: Sequence[int],
        num_threads: int | None = None,
        texts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Played:
        """Decode one group per problem.

        Args:
            problems: what is asked; environments and verdicts go by it.
            seeds: one per group; the same seed gives the same group, whatever else is in the batch.
            num_threads: N; None: the policy's own.
            texts: what to ask instead of the problems' own texts (:meth:`Task.follow_up`).
            max_new_tokens: most columns; None: the policy's own limit.
        """
        ...


@dataclass(frozen=True)
class Passage:
    """One thread that a method had written, and what for.

    Args:
        thread: what was written.
        role: ``path`` is a full solution, a candidate for the answer. Others: ``revision``, ``merge`` (answers too),
            ``judge``, ``step``, ``rating``, ``plan``.
        group: passages of the same number were decoded together.
    """

    thread: Thread
    role: str
    group: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a method made of one problem.

    Args:
        problem: the problem.
        passages: everything that was written, in order.
        chosen: index of the passage whose answer is the method's; None if it has none.
        cost: of everything together.
        confidence: the method's own belief in its answer, 0 … 1; None if it has none.
        notes: what else is worth keeping, JSON values.
    """

    problem: Problem
    passages: tuple[Passage, ...]
    chosen: int | None
    cost: Cost
    confidence: float | None = None
    notes: Mapping[str, object] = field(default_factory=dict)


class Method(ABC):
    """One way to spend a budget on a problem; YAML chooses it by class path.

    Args:
        policy: name of the policy that it asks; the evaluation config lists them.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy

    @abstractmethod
    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        """One outcome per problem, in order; deterministic in (problem, seed, weights), whatever the batch."""
