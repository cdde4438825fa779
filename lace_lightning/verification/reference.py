r"""What an answer is compared with, and how: the kind of a reference is decided from its problem, never guessed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lace_lightning.traces.schema import Problem
from lace_lightning.verification.spelling import is_one_number, split_values


class Kind(StrEnum):
    """How answers are compared with a reference (docs/verification.md).

    ``EXPRESSION``: one number, expression, set, interval, tuple or equation, symbolically. ``VALUES``: several of them
    between commas, in any order. ``CHOICE``: the letter of an option. ``TEXT``: words between commas, in this order.
    ``COUNTDOWN``: any arithmetic expression that uses each of ``numbers`` once and equals ``target``.
    """

    EXPRESSION = "expression"
    VALUES = "values"
    CHOICE = "choice"
    TEXT = "text"
    COUNTDOWN = "countdown"


@dataclass(frozen=True)
class Reference:
    """What an answer is compared with.

    Args:
        answer: the reference answer.
        kind: how to compare.
        tolerance: of an ``EXPRESSION``: a number this far away is as right.
        unit: of an ``EXPRESSION`` or ``VALUES``: what an answer may end with.
        numbers, target: of a ``COUNTDOWN``.
    """

    answer: str
    kind: Kind = Kind.EXPRESSION
    tolerance: float = 0.0
    unit: str = ""
    numbers: tuple[int, ...] = ()
    target: int = 0


def reference_of(problem: Problem) -> Reference:
    """The reference of a problem, from its facts, its source and the form of its answer.

    ``facts["kind"]`` names a :class:`Kind` where the rules of docs/verification.md would choose another;
    ``facts["tolerance"]``, ``["unit"]``, ``["numbers"]`` and ``["target"]`` mean what :class:`Reference` says.

    Raises:
        ValueError: a fact is none of what it may be, or there is no reference answer.
    """
    kind = _kind(problem)
    if kind == Kind.COUNTDOWN:
        return _countdown(problem)
    if not problem.answer.strip():
        raise ValueError(
            f"problem {problem.id!r} of {problem.source or 'an unnamed source'} has no answer: MathTask compares "
            "with a reference; drop the row or choose a task that needs none"
        )
    answer = problem.answer
    if kind == Kind.CHOICE:
        answer = _letter(problem)
    elif kind == Kind.TEXT and (spelled := _TEXT.fullmatch(answer)):
        answer = spelled[1]
    return Reference(answer, kind, _tolerance(problem), str(problem.facts.get("unit") or ""))


_LETTER = re.compile(r"(?:\\text(?:bf)?\{)?\s*\(?([A-H])\)?\s*\}?")
_TEXT = re.compile(r"\\text\{([^{}]*[A-Za-z]{2}[^{}]*)\}")


def _kind(problem: Problem) -> Kind:
    if named := problem.facts.get("kind"):
        if named not in list(Kind):
            raise ValueError(f"problem {problem.id!r}: kind={named!r} is none of {', '.join(Kind)}")
        return Kind(named)
    if "numbers" in problem.facts and "target" in problem.facts:
        return Kind.COUNTDOWN
    if problem.source == "livebench-reasoning":
        return Kind.TEXT
    if problem.source == "livebench-math" and str(problem.facts.get("subject")).startswith("olympiad"):
        return Kind.TEXT  # identifiers in the order of the gaps that they fill
    if _LETTER.fullmatch(problem.answer) and "(A)" in problem.text and "(B)" in problem.text:
        return Kind.CHOICE
    if _TEXT.fullmatch(problem.answer):
        return Kind.TEXT
    has_separators = problem.source == "olympiadbench" or not is_one_number(problem.answer)  # 58,500 is one in MATH
    return Kind.VALUES if has_separators and len(split_values(problem.answer)) > 1 else Kind.EXPRESSION


def _letter(problem: Problem) -> str:
    match = _LETTER.fullmatch(problem.answer.strip())
    if match is None:
        raise ValueError(
            f"problem {problem.id!r}: answer={problem.answer!r} is no letter A to H, as kind='choice' needs"
        )
    return match[1]


def _countdown(problem: Problem) -> Reference:
    numbers: Any = problem.facts.get("numbers")
    target: Any = problem.facts.get("target")
    if not (isinstance(numbers, list) and numbers and all(type(number) is int for number in [*numbers, target])):
        raise ValueError(
            f"problem {problem.id!r}: numbers={numbers!r}, target={target!r}; a list of whole numbers and one more "
            "are needed"
        )
    return Reference(problem.answer, Kind.COUNTDOWN, numbers=tuple(numbers), target=target)


def _tolerance(problem: Problem) -> float:
    value = problem.facts.get("tolerance") or 0
    try:
        tolerance = float(value)
    except (TypeError, ValueError):
        tolerance = math.nan
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"problem {problem.id!r}: tolerance={value!r} must be a number from 0 on, such as 1e-1")
    return tolerance
