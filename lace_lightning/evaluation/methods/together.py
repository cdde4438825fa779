"""Threads decoded together: LACE if the policy's threads exchange, Isolated Parallel if they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lace_lightning.decoding.group import Group
from lace_lightning.decoding.random import group_seed
from lace_lightning.evaluation.method import Method, Outcome, Policy
from lace_lightning.evaluation.methods.choice import certainty, vote
from lace_lightning.evaluation.methods.record import Record, check_at_least, records
from lace_lightning.traces.schema import Problem

Select = Literal["tag", "vote", "mean"]


class Together(Method):
    """One group of N threads.

    Args:
        policy: name of the policy that it asks.
        num_threads: N; None: the policy's own.
        select: ``tag`` takes the answer of the one thread that says ``[[best]]``, and has none if the tags are not
            valid; ``vote`` the most frequent answer; ``mean`` that of a thread drawn by the seed, whose accuracy is
            ``mean_at_n`` in expectation.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, policy: str, num_threads: int | None = None, select: Select = "tag") -> None:
        super().__init__(policy)
        check_at_least(1, num_threads=1 if num_threads is None else num_threads)
        if select not in get_args(Select):
            raise ValueError(f"select={select!r} of Together: choose one of {', '.join(get_args(Select))}")
        self.num_threads = num_threads
        self.select = select

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        played = policy.play(problems, seeds, num_threads=self.num_threads)
        owners = records(problems, seeds)
        for record, group, cost in zip(owners, played.groups, played.costs, strict=True):
            record.add(group, "path")
            record.cost += cost
        return [self._outcome(record, group) for record, group in zip(owners, played.groups, strict=True)]

    def _outcome(self, record: Record, group: Group) -> Outcome:
        paths = range(len(group.threads))
        chosen: int | None
        if self.select == "vote":
            chosen, share = vote(record, paths)
            return record.outcome(chosen, share)
        if self.select == "mean":
            chosen = group_seed(record.seed, "mean") % len(paths)
        else:
            chosen = group.best_index
        confidence = None if chosen is None else certainty(group.threads[chosen])
        return record.outcome(chosen, confidence, valid_tags=group.has_valid_tags)
