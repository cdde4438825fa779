"""What a method has had written about a problem so far, and rounds of questions that all problems take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.decoding.random import group_seed
from lace_lightning.evaluation.method import Cost, Outcome, Passage, Policy
from lace_lightning.tasks import FollowUp
from lace_lightning.traces.schema import Problem


@dataclass
class Record:
    """One problem on its way through a method.

    Args:
        problem: the problem.
        seed: of everything random about it.
        passages: what was written, in order.
        cost: of it.
        rounds: rounds of questions so far; with ``seed`` and its place in the round it seeds a thread.
        groups: groups so far, the number of the next one.
    """

    problem: Problem
    seed: int
    passages: list[Passage] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    rounds: int = 0
    groups: int = 0

    def add(self, group: Group, role: str) -> list[int]:
        """Keep a group's threads; their indices among the passages."""
        first = len(self.passages)
        self.passages += [Passage(thread, role, self.groups) for thread in group.threads]
        self.groups += 1
        return [*range(first, len(self.passages))]

    def thread(self, index: int) -> Thread:
        return self.passages[index].thread

    def text(self, index: int) -> str:
        """A thread as a follow-up question shows it."""
        return self.thread(index).text.strip()

    def outcome(self, chosen: int | None, confidence: float | None = None, **notes: object) -> Outcome:
        """The outcome; a passage without an answer is never chosen."""
        if chosen is not None and not answer_of(self.thread(chosen)):
            chosen = None
        return Outcome(self.problem, tuple(self.passages), chosen, self.cost, confidence, notes)


@dataclass(frozen=True)
class Question:
    """What one round asks about one problem.

    Args:
        record: where the replies go.
        role: of the replies.
        kind: of the follow-up question; None: solve the problem.
        texts: those that go with it.
        copies: how many single threads reply, each for itself.
    """

    record: Record
    role: str
    kind: FollowUp | None = None
    texts: tuple[str, ...] = ()
    copies: int = 1

    def text(self, policy: Policy) -> str:
        problem = self.record.problem
        return problem.text if self.kind is None else policy.task.follow_up(self.kind, problem, self.texts)


def records(problems: Sequence[Problem], seeds: Sequence[int]) -> list[Record]:
    return [Record(problem, seed) for problem, seed in zip(problems, seeds, strict=True)]


def ask(policy: Policy, questions: Sequence[Question]) -> list[list[int]]:
    """Put one round of questions to ``policy`` in one call: what stands in it is written side by side.

    Every reply is a single thread that reads no other. Copies of a question share its prompt, which is paid once; the
    columns of a record are those of its longest reply.

    Returns:
        For each question the indices of its replies among the record's passages.
    """
    if not questions:
        return []
    asked = [question for question in questions for _ in range(question.copies)]
    texts = [text for q in questions for text in [q.text(policy)] * q.copies]
    played = policy.play([q.record.problem for q in asked], _seeds(asked), num_threads=1, texts=texts)
    replies = iter(zip(played.groups, played.costs, strict=True))
    costs: dict[int, Cost] = {}
    indices = []
    for question in questions:
        groups, own = zip(*islice(replies, question.copies), strict=True)
        indices.append([i for group in groups for i in question.record.add(group, question.role)])
        key = id(question.record)
        costs[key] = side_by_side([*([costs[key]] if key in costs else []), same_prompt(own)])
    for record in _distinct(questions):
        record.cost += costs[id(record)]
        record.rounds += 1
    return indices


def solve_alone(policy: Policy, owners: Sequence[Record], num_threads: int) -> list[list[int]]:
    """The first round of most methods: ``num_threads`` single threads per problem, each a path of its own.

    Methods that begin so with the same policy, problem and seed begin with the same paths.
    """
    return ask(policy, [Question(record, "path", copies=num_threads) for record in owners])


def same_prompt(costs: Sequence[Cost]) -> Cost:
    """Cost of replies to one prompt, written side by side."""
    total = side_by_side(costs)
    return Cost(costs[0].prompt_tokens, total.tokens, total.columns, total.seconds)


def side_by_side(costs: Sequence[Cost]) -> Cost:
    """Cost of what is written at the same time: the columns of the longest, the sum of the rest."""
    return Cost(
        sum(cost.prompt_tokens for cost in costs),
        sum(cost.tokens for cost in costs),
        max(cost.columns for cost in costs),
        sum(cost.seconds for cost in costs),
    )


def answer_of(thread: Thread) -> str:
    """The answer as it is compared; empty if there is none."""
    return (thread.answer or "").strip()


def check_at_least(least: int, **options: int) -> None:
    """Raise ValueError for the first option below ``least``."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"{name}={value} of an evaluation method must be at least {least}")


def _seeds(asked: Sequence[Question]) -> list[int]:
    """One per reply: a function of the record's seed, the round and the reply's place among the record's own."""
    places: dict[int, int] = {}
    seeds = []
    for question in asked:
        record = question.record
        place = places[id(record)] = places.get(id(record), -1) + 1
        seeds.append(group_seed(record.seed, record.rounds, place))
    return seeds


def _distinct(questions: Sequence[Question]) -> list[Record]:
    return [*{id(question.record): question.record for question in questions}.values()]
