"""Best of N with the true verdicts: what no selection can beat."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Outcome, Policy
from lace_lightning.evaluation.methods.lone import LoneThreads
from lace_lightning.evaluation.methods.record import records, solve_alone
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem


class BestOfN(LoneThreads):
    """N single threads, of which the task's own judge picks a correct one: an upper bound, no method.

    Its notes say ``oracle: true``.
    """

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        owners = records(problems, seeds)
        solve_alone(policy, owners, self.num_threads)
        items = [(record.problem, passage.thread) for record in owners for passage in record.passages]
        verdicts = iter(policy.task.judge(items))
        outcomes = []
        for record in owners:
            own = [next(verdicts) for _ in record.passages]
            chosen = own.index(Verdict.CORRECT) if Verdict.CORRECT in own else 0
            outcomes.append(record.outcome(chosen, oracle=True))
        return outcomes
