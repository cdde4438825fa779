"""A program that finds short arithmetic expressions of a statement's numbers: a stand-in where no model is at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from random import Random

from lace_lightning.puzzles.countdown_solver import Step, Term, paths, rationals
from lace_lightning.synthesis.teacher import Query, Solution, Teacher, Turn

_NUMBER = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_WORD = re.compile(r"[a-z]+|%")
_SAID = {
    "half": 2, "twice": 2, "double": 2, "doubled": 2, "third": 3, "triple": 3, "quarter": 4, "dozen": 12, "%": 100,
    "percent": 100, "hours": 60, "hour": 60, "week": 7, "weeks": 7, "year": 12, "one": 1, "two": 2, "three": 3,
    "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "twenty": 20,
}  # fmt: skip
"""Numbers that words of a statement stand for."""
MAX_TERMS = 8
"""Most numbers of a statement that are looked at, the first ones."""
MAX_DIGITS = 12
"""Longer numbers of a statement are left out."""


@dataclass(frozen=True)
class _Way:
    """One expression: its steps, its shape as the method's name, and its value."""

    steps: tuple[Step, ...]
    shape: str

    @property
    def value(self) -> Fraction:
        return Fraction(self.steps[-1].value)


class ArithmeticTeacher(Teacher):
    """Writes threads that compute one expression of two or three numbers found in the statement, step by step.

    The method of a thread is the shape of its expression, such as ``(a / b) + a``. With ``knows_answer`` it looks for
    expressions whose value is the reference answer; such a thread has the right answer, though its expression may be
    right by accident, and is never understood from the statement.

    Args:
        knows_answer: use the reference answer; otherwise every expression is as likely as any other of its shape.
        share_right: with ``knows_answer``: how often a correct expression is looked for.
    """

    def __init__(self, knows_answer: bool = True, share_right: float = 0.5) -> None:
        if not 0 <= share_right <= 1:
            raise ValueError(f"share_right={share_right} must lie between 0 and 1")
        self.knows_answer = knows_answer
        self.share_right = share_right
        self.identity = f"ArithmeticTeacher(knows_answer={knows_answer}, share_right={share_right})"
        told = (
            "it is told the reference answer and looks for expressions with that value" if knows_answer else "blindly"
        )
        self.note = (
            "Not a language model: a program that combines two or three numbers of the statement at random; "
            f"{told}. Correct threads may be right by accident; their reasoning explains nothing."
        )

    def solve(self, queries: Sequence[Query]) -> list[Solution]:
        return [self._solve(query) for query in queries]

    def debate(self, turns: Sequence[Turn]) -> list[Solution]:
        """Early parts compute one step each; the last goes on from a step of another thread and names that thread."""
        return [self._turn(turn) for turn in turns]

    def _solve(self, query: Query) -> Solution:
        rng = Random(query.seed)
        ways = [way for way in _ways(query.problem.text) if way.shape not in query.avoid]
        way = self._choose(ways, query.problem.answer, rng)
        if way is None:
            return Solution("", None, error="no method left")
        text = "\n\n".join(f"Step {number}: {_equation(step)}." for number, step in enumerate(way.steps, start=1))
        numbers = ", ".join(dict.fromkeys(_numbers(way)))
        return Solution(f"The statement gives {numbers}.\n\n{text}", _spell(way.value), way.shape)

    def _turn(self, turn: Turn) -> Solution:
        rng, ways = Random(turn.seed), list(_ways(turn.problem.text))
        heard = [(n, step) for n, parts in sorted(turn.others.items()) for step in _steps_in(parts)]
        if not turn.is_last:
            way = self._choose(ways, turn.problem.answer, rng)
            if way is None:
                return Solution("", None, error="no method left")
            seen = [f"Thread {n} has {step}." for n, step in (rng.sample(heard, 1) if heard else [])]
            return Solution(" ".join([*seen, f"I try {_equation(way.steps[0])}."]), None, way.shape)
        sources = {step: n for n, step in heard}
        continuing = [way for way in ways if len(way.steps) > 1 and _equation(way.steps[0]) in sources]
        way = self._choose(continuing, turn.problem.answer, rng)
        if way is None:
            return Solution("", None, error="no step to go on from")
        first, rest = _equation(way.steps[0]), ", ".join(_equation(step) for step in way.steps[1:])
        return Solution(f"Thread {sources[first]} found {first}. From there {rest}.", _spell(way.value), way.shape)

    def _choose(self, ways: Sequence[_Way], reference: str, rng: Random) -> _Way | None:
        """A shape at random, then a way of this shape at random; right ones, if they are known and asked for."""
        if self.knows_answer:
            wanted = _number(reference)
            looks_for_right = rng.random() < self.share_right
            ways = [way for way in ways if (way.value == wanted) == looks_for_right] or ways
        by_shape: dict[str, list[_Way]] = {}
        for way in ways:
            by_shape.setdefault(way.shape, []).append(way)
        return rng.choice(by_shape[rng.choice(sorted(by_shape))]) if by_shape else None


@lru_cache(maxsize=64)
def _ways(statement: str) -> tuple[_Way, ...]:
    """Every expression of two or three of the statement's numbers (each up to twice) with a positive value."""
    terms = [Term(value, _spell(value)) for value in _numbers_said(statement)]
    found: dict[str, _Way] = {}
    for size in (2, 3):
        for chosen in combinations_with_replacement(terms, size):
            if size == 3 and chosen[0] == chosen[2]:
                continue
            for steps in paths(chosen, rationals):
                if all(step.value > 0 and _is_short(Fraction(step.value)) for step in steps):
                    found.setdefault(steps[-1].text, _Way(steps, _shape(steps[-1].text)))
    return tuple(found.values())


def _numbers_said(statement: str) -> list[Fraction]:
    """Distinct numbers of a statement: digits in reading order, then those said in words."""
    digits = [number for match in _NUMBER.findall(statement) if (number := _number(match)) is not None]
    words = [Fraction(_SAID[word]) for word in _WORD.findall(statement.lower()) if word in _SAID]
    return [number for number in dict.fromkeys(digits + words) if number][:MAX_TERMS]


def _number(text: str) -> Fraction | None:
    """The number that a text spells with digits; None if it is another kind of text."""
    plain = text.strip().replace(",", "").removeprefix("$").removesuffix("%")
    is_number = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", plain) and len(plain) <= MAX_DIGITS
    return Fraction(plain) if is_number else None


def _spell(value: int | Fraction) -> str:
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.2f}".rstrip("0") if _is_short(value) else str(value)


def _is_short(value: Fraction) -> bool:
    """At most two places behind the point, as amounts have."""
    return (value * 100).denominator == 1


def _shape(expression: str) -> str:
    """The expression with a letter for each number; equal numbers have equal letters.

    >>> _shape("( 48 / 2 ) + 48")
    '(a / b) + a'
    """
    letters: dict[str, str] = {}
    parts = [
        letters.setdefault(word, "abc"[len(letters)]) if word[0].isdigit() else word for word in expression.split()
    ]
    return " ".join(parts).replace("( ", "(").replace(" )", ")")


def _equation(step: Step) -> str:
    return f"{_spell(step.left.value)} {step.operation} {_spell(step.right.value)} = {_spell(step.value)}"


def _numbers(way: _Way) -> list[str]:
    return [word for word in way.steps[-1].text.split() if word[0].isdigit()]


def _steps_in(parts: Sequence[str]) -> list[str]:
    """The equations that a thread wrote itself, those behind "I try"."""
    return [part.partition("I try ")[2].removesuffix(".") for part in parts if "I try " in part]
