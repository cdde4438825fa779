"""One thread, alone."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty
from lace_lightning.evaluation.methods.record import records, solve_alone
from lace_lightning.traces.schema import Problem


class SingleThread(Method):
    """One thread; its answer counts.

    Args:
        policy: name of the policy that it asks.
    """

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        solve_alone(policy, owners, 1)
        return [record.outcome(0, certainty(record.thread(0))) for record in owners]
