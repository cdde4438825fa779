"""The model opens branches itself, works them out side by side and joins them, as in Parallel-R1 and NPR."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty, parse_headings
from lace_lightning.evaluation.methods.merge import merge
from lace_lightning.evaluation.methods.record import Question, Record, ask, check_at_least, records
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem


class ForkJoin(Method):
    """A plan names branches, each is worked out by a thread that knows its heading, and a last thread joins them.

    A plan without branches stands for itself: its own answer counts. Of one branch nothing is joined. There is one
    block of branches per problem; in the papers there may be several one after the other, and branches go on in the
    plan's cache, where ours begin with a prompt of their own.

    Args:
        policy: name of the policy that it asks.
        max_branches: headings beyond so many are dropped.

    Raises:
        ValueError: ``max_branches`` is below 1.
    """

    def __init__(self, policy: str, max_branches: int = 4) -> None:
        super().__init__(policy)
        check_at_least(1, max_branches=max_branches)
        self.max_branches = max_branches

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        ask(policy, [Question(record, "plan", FollowUp.FORK) for record in owners])
        headings = [parse_headings(record.thread(0))[: self.max_branches] for record in owners]
        ask(
            policy,
            [
                Question(record, "path", FollowUp.BRANCH, (heading,))
                for record, own in zip(owners, headings, strict=True)
                for heading in own
            ],
        )
        forked = [record for record, own in zip(owners, headings, strict=True) if len(own) > 1]
        joined = iter(merge(policy, forked, [[*range(1, len(record.passages))] for record in forked]))
        return [
            next(joined) if len(own) > 1 else _unforked(record) for record, own in zip(owners, headings, strict=True)
        ]


def _unforked(record: Record) -> Outcome:
    last = len(record.passages) - 1
    return record.outcome(last, certainty(record.thread(last)))
