"""What the tests of evaluation share: a policy that knows its lines, simple methods, and hand-made records."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.evaluation.method import Method, Outcome, Passage, Policy
from lace_lightning.traces.schema import Problem


class Solo(Method):
    """All threads of one group are paths; the first one is chosen."""

    def __init__(self, policy: str, num_threads: int | None = None) -> None:
        super().__init__(policy)
        self.num_threads = num_threads

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        played = policy.play(problems, seeds, self.num_threads)
        return [
            Outcome(group.problem, tuple(Passage(thread, "path") for thread in group.threads), 0, cost, confidence=0.5)
            for group, cost in zip(played.groups, played.costs, strict=True)
        ]
