"""One attempt after the other, each reading all before it."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty, claims
from lace_lightning.evaluation.methods.record import (
    Question,
    Record,
    answer_of,
    ask,
    check_at_least,
    records,
    solve_alone,
)
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem


class SequentialRefinement(Method):
    """A single thread, then revisions that read all earlier attempts; the last one with an answer counts.

    Args:
        policy: name of the policy that it asks.
        rounds: attempts in all, the first included.
        stop: no more attempts once one says ``[[best]]`` or ``[[success]]`` of itself.

    Raises:
        ValueError: ``rounds`` is below 1.
    """

    def __init__(self, policy: str, rounds: int = 4, stop: bool = True) -> None:
        super().__init__(policy)
        check_at_least(1, rounds=rounds)
        self.rounds = rounds
        self.stop = stop

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        solve_alone(policy, owners, 1)
        for _ in range(self.rounds - 1):
            ask(policy, [_revise(record) for record in owners if not (self.stop and claims(_last(record)))])
        return [_outcome(record) for record in owners]


def _last(record: Record) -> Thread:
    return record.passages[-1].thread


def _revise(record: Record) -> Question:
    attempts = tuple(record.text(index) for index in range(len(record.passages)))
    return Question(record, "revision", FollowUp.REFINE, attempts)


def _outcome(record: Record) -> Outcome:
    answered = [index for index in range(len(record.passages)) if answer_of(record.thread(index))]
    chosen = answered[-1] if answered else None
    return record.outcome(chosen, None if chosen is None else certainty(record.thread(chosen)))
