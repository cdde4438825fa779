"""Countdown: combine all given numbers, each exactly once, with + - * / to reach a target.

Threads divide the search by its first step: which two numbers are combined, and how. They do the arithmetic and judge
it themselves, in words that are whole numbers, so the prompt decides everything and no ceiling holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from lace_lightning.puzzles.countdown_follow_ups import word_follow_up
from lace_lightning.puzzles.countdown_solver import Naturals, Step, Way, paths, terms_of
from lace_lightning.puzzles.division import Attempt, assess, divide_search
from lace_lightning.puzzles.expression import parse_expression
from lace_lightning.puzzles.word_puzzle import HIT, MISS, WordPuzzle, check_sizes, split_of
from lace_lightning.tasks import FollowUp, Verdict
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Thread

LETTERS = "abcd"
OPERATIONS = "+-*/"
MAX_DRAWS = 10_000
Ways = dict[str, list[Way]]
"""Ways to combine all numbers, by the word of their first step."""


class Countdown(WordPuzzle):
    """``30 100 93 -> 23``: per try a thread proposes a first step, commits to one, and carries it through.

    A first step is one word: ``ab+`` adds the first and the second number, ``bc-`` takes the smaller of the second and
    third from the larger. A try reads ``ab+ bc- 100 - 93 = 7 , 30 - 7 = 23 hit`` (proposal, commitment, equations,
    verdict), the answer ``30 - ( 100 - 93 )``; with a fixed count of numbers every try has the same count of tokens.

    Args:
        numbers: how many numbers a problem has, 2 to 4.
        max_number: largest given number and largest target.
        tries: first steps that each thread explores.
        max_value: largest intermediate result of traces, the largest word. Traces stay in natural numbers; the judge
            does not mind any rational.
        exclude: JSONL file of problems that must never be generated (those of an evaluation set), each row with
            ``numbers`` and ``target`` at its top or under ``facts``; the order of the numbers does not matter.
        seed: problems and traces are a function of (seed, split, index).

    Raises:
        ValueError: an option is out of range, or a row of ``exclude`` has no usable numbers and target.
        FileNotFoundError: ``exclude`` does not exist.
    """

    def __init__(
        self,
        numbers: int = 3,
        max_number: int = 100,
        tries: int = 2,
        max_value: int = 200,
        exclude: str | None = None,
        seed: int = 0,
    ) -> None:
        check_sizes("numbers", [numbers], 2, len(LETTERS))
        check_sizes("max_number", [max_number], 1, 999)
        check_sizes("tries", [tries], 1, 99)
        check_sizes("max_value", [max_value], max_number, 9999)
        pairs = [first + second for k, second in enumerate(LETTERS[:numbers]) for first in LETTERS[:k]]
        moves = [pair + operation for pair in pairs for operation in OPERATIONS]
        values = map(str, range(max_value + 1))
        super().__init__(["->", "(", ")", "=", ",", *OPERATIONS, *moves, *values, *map(str, FollowUp)], seed)
        self.numbers = numbers
        self.max_number = max_number
        self.tries = tries
        self._combine = Naturals(max_value)
        self._excluded = set() if exclude is None else _read_keys(exclude)

    def problem(self, index: int, split: str = "train") -> Problem:
        """Random numbers, and the result of one of all ways to combine them as target.

        Numbers (in any order) with a target belong to the training or to the test split for ever, whatever the seed.

        Raises:
            RuntimeError: ``max_number`` and ``exclude`` leave (almost) no problem in this split.
        """
        numbers, solution = self._draw(self._random(split, index), split)
        target = int(solution[-1].value)
        return Problem(
            id=f"countdown-{split}-{index}",
            text=_text(numbers, target),
            answer=solution[-1].text,
            facts={"numbers": numbers, "target": target},
            source="countdown",
        )

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """Threads of :func:`divide_search`; index decides who gives way, so never shuffle them afterwards.

        After its first step a thread takes any way to the target if there is one, else any way at all.
        """
        problem, rng = self.problem(index, split), self._random(split, index, num_threads)
        ways = self._ways(problem.facts["numbers"])
        hits = reaching(ways, problem.facts["target"])
        attempts = divide_search(list(ways), hits, num_threads, self.tries, rng)
        threads = [self._write(own, tag, ways, hits, rng) for own, tag in zip(attempts, assess(attempts), strict=True)]
        return Trace(problem, tuple(threads))

    def _write(self, own: Sequence[Attempt[str]], tag: Tag, ways: Ways, hits: Ways, rng: Random) -> TraceThread:
        """A thread that carries each of its attempts through."""
        tried: dict[str, Way] = {}  # a thread that repeats a step repeats what it wrote then
        for attempt in own:
            move = attempt.committed
            tried[move] = tried.get(move) or rng.choice(hits.get(move) or ways[move])
        text = " ".join(
            f"{proposed} {move} {equations(tried[move])} {HIT if is_hit else MISS}" for proposed, move, is_hit in own
        )
        answer = tried[own[-1].committed][-1].text
        return TraceThread(text, answer, tag, strategy=" ".join(tried), origin="countdown oracle")

    def attempt(self, problem: Problem, avoid: Sequence[str], rng: Random) -> TraceThread | None:
        """What a thread alone would write, with first steps that are in no strategy of ``avoid``; None if none is left.

        The thread searches blindly, as those of :meth:`trace` do: whether it hits is luck.
        """
        ways = self._ways(problem.facts["numbers"])
        hits = reaching(ways, problem.facts["target"])
        used = {move for strategy in avoid for move in strategy.split()}
        left = [move for move in ways if move not in used]
        if not left:
            return None
        attempts = divide_search(left, hits, 1, self.tries, rng)
        return self._write(attempts[0], assess(attempts)[0], ways, hits, rng)

    def follow_up(self, kind: FollowUp, problem: Problem, texts: Sequence[str]) -> str:
        """The problem's text, the word of ``kind``, and of each text as many words of its thought as a thread needs.

        So no prompt is longer than the number of texts makes it, whatever a model wrote.
        """
        words_of_a_try = 6 * self.numbers - 4  # proposal, commitment, equations with commas between, verdict
        return word_follow_up(kind, problem.text, texts, self.tries * words_of_a_try)

    def adapt(self, problem: Problem) -> Problem:
        """A problem with ``numbers`` and ``target`` among its facts, reworded as this puzzle's prompt.

        Raises:
            ValueError: facts are missing, or the puzzle's vocabulary does not cover them.
        """
        numbers, target = _numbers_and_target(problem.facts, f"problem {problem.id!r}")
        if len(numbers) != self.numbers or max(*numbers, target) > self.max_number:
            raise ValueError(
                f"problem {problem.id!r} has numbers={numbers} and target={target}, but this Countdown "
                f"has numbers={self.numbers} and max_number={self.max_number}: change them or leave the problem out"
            )
        return replace(problem, text=_text(numbers, target))

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        """Correct is any expression that uses each number exactly once and equals the target, in exact arithmetic."""
        return [
            judge_expression(thread.answer or "", problem.facts["numbers"], problem.facts["target"])
            for problem, thread in items
        ]

    def _draw(self, rng: Random, split: str) -> tuple[list[int], Way]:
        for _ in range(MAX_DRAWS):
            numbers = [rng.randint(1, self.max_number) for _ in range(self.numbers)]
            in_range = [way for way in self._all_ways(numbers) if 1 <= way[-1].value <= self.max_number]
            if not in_range:
                continue
            solution = rng.choice(in_range)
            key = _key(numbers, int(solution[-1].value))
            if split_of(key) == split and key not in self._excluded:
                return numbers, solution
        raise RuntimeError(
            f"no Countdown problem for split={split!r} in {MAX_DRAWS} draws with max_number={self.max_number} and "
            f"{len(self._excluded)} excluded problems: raise max_number or exclude fewer"
        )

    def _all_ways(self, numbers: list[int]) -> list[Way]:
        return _all_ways(tuple(numbers), self._combine)

    def _ways(self, numbers: list[int]) -> Ways:
        ways: Ways = {}
        for way in self._all_ways(numbers):
            ways.setdefault(first_step(way), []).append(way)
        return ways


@lru_cache(maxsize=16)
def _all_ways(numbers: tuple[int, ...], combine: Naturals) -> list[Way]:
    """A trace asks for the ways that its problem was drawn with."""
    return list(paths(terms_of(numbers), combine))


def first_step(way: Way) -> str:
    """The word of a way's first step."""
    i, j = way[0].positions
    return LETTERS[i] + LETTERS[j] + way[0].operation


def reaching(ways: Ways, target: int) -> Ways:
    """Those of ``ways`` that reach ``target``, without first steps that never do."""
    hits = {move: [way for way in of_move if way[-1].value == target] for move, of_move in ways.items()}
    return {move: of_move for move, of_move in hits.items() if of_move}


def equations(way: Sequence[Step]) -> str:
    """``100 - 93 = 7 , 30 - 7 = 23``."""
    return " , ".join(f"{step.left.value} {step.operation} {step.right.value} = {step.value}" for step in way)


def _text(numbers: list[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))} -> {target}"


def _key(numbers: list[int], target: int) -> str:
    return f"countdown {_text(sorted(numbers), target)}"


def judge_expression(text: str, numbers: Sequence[int], target: int) -> Verdict:
    """Correct is an expression that uses each of ``numbers`` exactly once and equals ``target``; safe on any text."""
    expression = parse_expression(text)
    if expression is None:
        return Verdict.UNPARSABLE
    is_complete = sorted(expression.numbers) == sorted(numbers)
    return Verdict.CORRECT if is_complete and expression.value == target else Verdict.WRONG


def _read_keys(path: str) -> set[str]:
    keys = set()
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"exclude={path!r}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); one object per line is needed") from error
            facts = row.get("facts", row) if isinstance(row, dict) else {}
            keys.add(_key(*_numbers_and_target(facts, where)))
    return keys


def _numbers_and_target(facts: Any, where: str) -> tuple[list[int], int]:
    numbers: Any
    target: Any
    numbers, target = (facts.get("numbers"), facts.get("target")) if isinstance(facts, dict) else (None, None)
    if isinstance(numbers, list) and numbers and all(type(n) is int and n > 0 for n in [*numbers, target]):
        return numbers, target
    raise ValueError(
        f"{where}: numbers={numbers!r}, target={target!r}; a list of positive whole numbers and one more are needed"
    )
