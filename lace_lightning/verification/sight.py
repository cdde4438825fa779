"""Verdicts at sight: answers that need no parser of mathematics get theirs here, the others a question for a worker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from lace_lightning.tasks import Verdict
from lace_lightning.verification.reference import Kind, Reference
from lace_lightning.verification.spelling import (
    MAX_LENGTH,
    is_readable,
    letters,
    plain_numbers,
    split_values,
    tidy,
    without_unit,
    without_words,
    words,
)

_NUMBER = re.compile(r"-?[0-9]{1,12}|-?[0-9]{1,7}\.[0-9]{1,6}")
_COUNTDOWN = {r"\left": "", r"\right": "", r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/"}
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


@dataclass(frozen=True)
class Question:
    """What a worker is asked: whether the values of an answer are those of the reference, each once, in any order."""

    gold: list[str]
    target: list[str]
    tolerance: float = 0.0


def look(reference: Reference, answer: str | None) -> Verdict | Question:
    """The verdict on an answer if it needs no parser of mathematics, else the question that does."""
    if answer is None or not is_readable(answer):
        return Verdict.UNPARSABLE
    text = tidy(answer)
    match reference.kind:
        case Kind.TEXT:
            return _compare_found(words(reference.answer), words(text))
        case Kind.CHOICE:
            return _compare_found({reference.answer}, letters(text))
        case Kind.COUNTDOWN:
            return _judge_countdown(reference, text)
        case _:
            return _look_at_mathematics(reference, text)


def _compare_found(gold: object, found: object) -> Verdict:
    if not found:
        return Verdict.UNPARSABLE
    return Verdict.CORRECT if found == gold else Verdict.WRONG


def _look_at_mathematics(reference: Reference, text: str) -> Verdict | Question:
    gold, text = tidy(reference.answer), without_unit(text, reference.unit)
    if text == gold:
        return Verdict.CORRECT
    if len(gold) > MAX_LENGTH:
        return Verdict.UNPARSABLE
    if reference.kind == Kind.VALUES:
        return _look_at_values(gold, text, reference)
    is_number = _NUMBER.fullmatch(gold) is not None
    target = plain_numbers(without_words(text) if is_number else text)
    if target is None:
        return Verdict.UNPARSABLE
    if is_number and _NUMBER.fullmatch(target):
        distance = abs(Decimal(gold) - Decimal(target))
        return Verdict.CORRECT if distance <= Decimal(str(reference.tolerance)) else Verdict.WRONG
    return Question([gold], [target], reference.tolerance)


def _look_at_values(gold: str, text: str, reference: Reference) -> Verdict | Question:
    expected, found = split_values(gold), split_values(text)
    if len(found) == 1 < len(expected):
        found = split_values(_without_brackets(text))
    found = [without_unit(value, reference.unit) for value in found]
    is_short = any(r"\pm" in value for value in [*expected, *found])  # one value that stands for two
    if is_short:
        return Question([", ".join(expected)], [", ".join(found)])
    if len(expected) != len(found):
        return Verdict.WRONG
    return Question(expected, found)


def _without_brackets(text: str) -> str:
    r"""What stands in ``(…)``, ``[…]``, ``\{…\}``, with or without ``\left`` and ``\right``."""
    match = re.fullmatch(r"(?:\\left)?\\?[(\[{](.*?)(?:\\right)?\\?[)\]}]", text, re.DOTALL)
    return match[1] if match else text


def _judge_countdown(reference: Reference, text: str) -> Verdict:
    """An expression, LaTeX or not, which may say what it equals."""
    from lace_lightning.puzzles.countdown import judge_expression  # the puzzles load torch

    for spelled, plain in _COUNTDOWN.items():
        text = text.replace(spelled, plain)
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    expression, _, value = text.partition("=")
    if value and not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", value):
        return Verdict.UNPARSABLE
    verdict = judge_expression(expression.strip(), reference.numbers, reference.target)
    is_consistent = not value or int(value) == reference.target
    return verdict if is_consistent or verdict == Verdict.UNPARSABLE else Verdict.WRONG
