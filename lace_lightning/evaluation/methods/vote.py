"""Self-consistency: independent threads, and a vote."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Outcome, Policy
from lace_lightning.evaluation.methods.choice import claiming, vote
from lace_lightning.evaluation.methods.lone import LoneThreads
from lace_lightning.evaluation.methods.record import records, solve_alone
from lace_lightning.traces.schema import Problem


class IndependentVote(LoneThreads):
    """N single threads and the most frequent of their answers (self-consistency).

    Args:
        policy: name of the policy that it asks.
        num_threads: N.
        claimed: only threads vote that say ``[[best]]`` or ``[[success]]`` of themselves, unless none does: each thread
            assesses itself as LACE's threads do, but without having read the others.

    Raises:
        ValueError: ``num_threads`` is below 1.
    """

    def __init__(self, policy: str, num_threads: int = 4, claimed: bool = False) -> None:
        super().__init__(policy, num_threads)
        self.claimed = claimed

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        outcomes = []
        for record, paths in zip(owners, solve_alone(policy, owners, self.num_threads), strict=True):
            chosen, share = vote(record, claiming(record, paths) if self.claimed else paths)
            outcomes.append(record.outcome(chosen, share))
        return outcomes
