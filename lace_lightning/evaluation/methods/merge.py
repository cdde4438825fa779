"""Independent paths and one pass that reads them all, as in ParaThinker."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty, vote
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


class MergePaths(LoneThreads):
    """N single threads, then one more that reads all of them and answers.

    Where that one gives no answer, the paths vote, which the notes say (``fallback``). Unlike ParaThinker the last pass
    reads the paths as text of a new prompt, not in their caches: its prompt is paid in full.
    """

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        paths = solve_alone(policy, owners, self.num_threads)
        return merge(policy, owners, paths)


def merge(policy: Policy, owners: Sequence[Record], paths: Sequence[list[int]]) -> list[Outcome]:
    """One pass per record over its paths, and the outcome."""
    questions = [
        Question(record, "merge", FollowUp.MERGE, tuple(record.text(index) for index in own))
        for record, own in zip(owners, paths, strict=True)
    ]
    replies = ask(policy, questions)
    return [_outcome(record, own, reply) for record, own, (reply,) in zip(owners, paths, replies, strict=True)]


def _outcome(record: Record, paths: list[int], reply: int) -> Outcome:
    if answer_of(record.thread(reply)):
        return record.outcome(reply, certainty(record.thread(reply)), fallback=False)
    chosen, share = vote(record, paths)
    return record.outcome(chosen, share, fallback=True)
