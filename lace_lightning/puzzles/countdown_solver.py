"""Exhaustive search over Countdown expressions: every way to combine all numbers, two at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple


class Term(NamedTuple):
    """A number, given or computed, and the expression it came from."""

    value: int | Fraction
    text: str


class Step(NamedTuple):
    """One combination: ``left operation right = value``, on the terms at ``positions`` of those still there."""

    positions: tuple[int, int]
    left: Term
    operation: str
    right: Term
    value: int | Fraction

    @property
    def text(self) -> str:
        """The whole expression so far, operands in parentheses where they are computed."""
        return f"{self.left.text} {self.operation} {self.right.text}"


Way = tuple[Step, ...]
"""Steps one after the other, until one number is left."""

Combine = Callable[[Term, Term], Iterator[tuple[Term, str, Term, int | Fraction]]]


def rationals(a: Term, b: Term) -> Iterator[tuple[Term, str, Term, Fraction]]:
    """Every result of two terms, exactly, negative numbers and fractions included."""
    x, y = Fraction(a.value), Fraction(b.value)
    yield a, "+", b, x + y
    yield a, "-", b, x - y
    yield b, "-", a, y - x
    yield a, "*", b, x * y
    if y:
        yield a, "/", b, x / y
    if x:
        yield b, "/", a, y / x


@dataclass(frozen=True)
class Naturals:
    """Every result of two natural terms that is a natural number up to ``max_value`` itself; smaller into larger."""

    max_value: int

    def __call__(self, a: Term, b: Term) -> Iterator[tuple[Term, str, Term, int]]:
        high, low = (a, b) if a.value >= b.value else (b, a)
        x, y = int(high.value), int(low.value)
        if x + y <= self.max_value:
            yield a, "+", b, x + y
        yield high, "-", low, x - y
        if x * y <= self.max_value:
            yield a, "*", b, x * y
        if y and x % y == 0:
            yield high, "/", low, x // y


def paths(terms: Sequence[Term], combine: Combine) -> Iterator[Way]:
    """Every sequence of ``len(terms) - 1`` steps that leaves one term."""
    if len(terms) == 1:
        yield ()
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for left, operation, right, value in combine(terms[i], terms[j]):
            step = Step((i, j), left, operation, right, value)
            if not rest:  # the last step; going on would cost as much as all before
                yield (step,)
                continue
            for later in paths([Term(value, f"( {step.text} )"), *rest], combine):
                yield (step, *later)


def solutions(numbers: Iterable[int], target: int, combine: Combine = rationals) -> Iterator[str]:
    """Every expression, one per path, that uses each number exactly once and equals ``target``.

    >>> next(solutions([30, 100, 93], 23))
    '( 30 - 100 ) + 93'
    """
    for steps in paths(terms_of(numbers), combine):
        if steps and steps[-1].value == target:
            yield steps[-1].text


def terms_of(numbers: Iterable[int]) -> list[Term]:
    return [Term(number, str(number)) for number in numbers]
