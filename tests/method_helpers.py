"""A policy that answers from a script, for the tests of evaluation methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lace_lightning.decoding.group import Group, Thread
from lace_lightning.evaluation.method import Cost, Method, Outcome, Played
from lace_lightning.puzzles import Countdown
from lace_lightning.tasks import Task
from lace_lightning.traces.schema import Problem
from lace_lightning.traces.tags import parse_answer, parse_tag

LOGPROB = -0.25
Reply = Callable[[str, int, int], str]
"""(what is asked, seed, index of the thread) -> what the thread writes."""


@dataclass(frozen=True)
class Call:
    """One call of ``play``."""

    texts: list[str]
    seeds: list[int]
    num_threads: int | None


class ScriptedPolicy:
    """Every word is a token of log-probability ``LOGPROB``, unless ``logprobs`` says otherwise; a call takes 1 s."""

    num_threads = 4

    def __init__(self, reply: Reply, task: Task | None = None, logprobs: Callable[[str], list[float]] | None = None):
        self.reply = reply
        self.task = task or Countdown(tries=1)
        self.logprobs = logprobs or (lambda text: [LOGPROB] * len(text.split()))
        self.calls: list[Call] = []

    def play(
        self,
        problems: Sequence[Problem],
        seeds: Sequence[int],
        num_threads: int | None = None,
        texts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Played:
        assert problems and len(problems) == len(seeds)
        asked = [problem.text for problem in problems] if texts is None else list(texts)
        self.calls.append(Call(asked, list(seeds), num_threads))
        width = num_threads or self.num_threads
        groups, costs = [], []
        for problem, seed, text in zip(problems, seeds, asked, strict=True):
            threads = tuple(self._thread(self.reply(text, seed, n)) for n in range(width))
            groups.append(Group(problem, threads, seed))
            tokens = [thread.num_tokens for thread in threads]
            costs.append(Cost(len(text.split()), sum(tokens), max(tokens), 1 / len(problems)))
        return Played(groups, costs)

    def _thread(self, text: str) -> Thread:
        thought, opening, assessment = text.partition(self.task.template.opening.strip())
        logprobs = self.logprobs(text)
        count = len(logprobs)
        return Thread(
            text=text, thought=thought.strip(), answer=parse_answer(assessment) if opening else None,
            tag=parse_tag(assessment) if opening else None, observations=(), token_ids=tuple(range(count)),
            columns=tuple(range(count)), logprobs=tuple(logprobs), forced=(False,) * count, finished="eos",
        )  # fmt: skip


def problem(number: int = 0) -> Problem:
    return Problem(f"p{number}", "30 100 93 -> 23", "", {"numbers": [30, 100, 93], "target": 23})


def run(method: Method, policy: ScriptedPolicy, seed: int = 7) -> Outcome:
    """The outcome of one problem."""
    (outcome,) = method.solve(policy, [problem()], [seed])
    return outcome


def answer(outcome: Outcome) -> str | None:
    return None if outcome.chosen is None else outcome.passages[outcome.chosen].thread.answer


def in_turn(*lines: str) -> Reply:
    """Answers one line after the other, whatever is asked."""
    left = iter(lines)
    return lambda text, seed, thread: next(left)
