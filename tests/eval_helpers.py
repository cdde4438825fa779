"""What the tests of evaluation share: a policy that needs no model, methods of a few lines, and hand-made outcomes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.method import Cost, Method, Outcome, Passage, Played, Policy
from lace_lightning.tasks import Task, Verdict
from lace_lightning.traces.schema import Problem, Tag
from lace_lightning.traces.template import Template


def thread(answer: str | None = "7", tag: Tag | None = Tag.BEST, thought: str = "so", tokens: int = 3) -> Thread:
    return Thread(
        text=f"{thought} {answer}", thought=thought, answer=answer, tag=tag, observations=("miss",),
        token_ids=tuple(range(tokens)), columns=tuple(range(tokens)), logprobs=(-0.5,) * tokens,
        forced=(False,) * tokens, finished="eos",
    )  # fmt: skip


def problem(number: int, answer: str = "7") -> Problem:
    return Problem(f"p{number}", "What is it? " * (1 + number % 3), answer, {"number": number}, "made")


def judged(
    paths: Sequence[tuple[str | None, Verdict]],
    chosen: int | None = 0,
    number: int = 0,
    method: str = "lace",
    seed: int = 0,
    confidence: float | None = None,
    same_group: bool = True,
) -> JudgedOutcome:
    passages = tuple(
        JudgedPassage(Passage(thread(answer, Tag.FAIL if n else Tag.BEST), "path", 0 if same_group else n), verdict)
        for n, (answer, verdict) in enumerate(paths)
    )
    return JudgedOutcome("toy", method, seed, problem(number), passages, chosen, Cost(5, 12, 4, 0.5), confidence)


class Same(Task):
    """Right is the problem's own answer, as text."""

    template = Template()

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        return [
            Verdict.UNPARSABLE if t.answer is None else Verdict.CORRECT if t.answer == p.answer else Verdict.WRONG
            for p, t in items
        ]


@dataclass
class Guessing:
    """A policy whose threads guess by their seed; it fails on batches that hold a problem named in ``poison``."""

    task: Task = field(default_factory=Same)
    num_threads: int = 3
    poison: frozenset[str] = frozenset()
    calls: list[list[str]] = field(default_factory=list)

    def play(
        self,
        problems: Sequence[Problem],
        seeds: Sequence[int],
        num_threads: int | None = None,
        texts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Played:
        self.calls.append([p.id for p in problems])
        if bad := self.poison & {p.id for p in problems}:
            raise ArithmeticError(f"cannot play {sorted(bad)[0]}")
        groups, costs = [], []
        for asked, seed in zip(problems, seeds, strict=True):
            draw = random.Random(seed)
            threads = tuple(thread(draw.choice(["7", "8", "9", None])) for _ in range(num_threads or self.num_threads))
            groups.append(Group(asked, threads, seed))
            costs.append(Cost(4, 3 * len(threads), 3, 0.25))
        return Played(groups, costs)


class Solo(Method):
    """All threads of one group are paths; the first one is chosen."""

    def __init__(self, policy: str = "any", num_threads: int | None = None) -> None:
        super().__init__(policy)
        self.num_threads = num_threads

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        played = policy.play(problems, seeds, self.num_threads)
        return [
            Outcome(group.problem, tuple(Passage(one, "path") for one in group.threads), 0, cost, confidence=0.5)
            for group, cost in zip(played.groups, played.costs, strict=True)
        ]


class Slow(Solo):
    """Takes its time, so that it can be killed at work."""

    def solve(self, policy: Policy, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Outcome]:
        import time

        time.sleep(0.3)
        return super().solve(policy, problems, seeds)
