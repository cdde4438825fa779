"""Selection by a judge that reads all candidates."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty, parse_index, vote
from lace_lightning.evaluation.methods.lone import LoneThreads
from lace_lightning.evaluation.methods.record import (
    Question,
    Record,
    answer_of,
    ask,
    records,
    solve_alone,
)
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem


class JudgeSelection(LoneThreads):
    """N single threads; then the model reads those with an answer and names one.

    Where only one thread has an answer, nothing is asked. A reply that names no candidate leaves it to the vote, which
    the notes say (``fallback``).
    """

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        solve_alone(policy, owners, self.num_threads)
        candidates = [_answered(record) for record in owners]
        ask(
            policy,
            [
                Question(record, "judge", FollowUp.JUDGE, tuple(record.text(index) for index in some))
                for record, some in zip(owners, candidates, strict=True)
                if len(some) > 1
            ],
        )
        return [self._outcome(record, some) for record, some in zip(owners, candidates, strict=True)]

    def _outcome(self, record: Record, candidates: list[int]) -> Outcome:
        reply = record.passages[-1].thread
        if len(candidates) < 2:
            chosen = candidates[0] if candidates else None
            return record.outcome(chosen, None if chosen is None else certainty(record.thread(chosen)), fallback=False)
        number = parse_index(reply, len(candidates))
        if number is None:
            chosen, share = vote(record, candidates)
            return record.outcome(chosen, share, fallback=True)
        return record.outcome(candidates[number], certainty(reply), fallback=False)


def _answered(record: Record) -> list[int]:
    return [index for index in range(len(record.passages)) if answer_of(record.thread(index))]
