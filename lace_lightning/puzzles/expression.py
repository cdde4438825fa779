"""A safe reader of arithmetic expressions: whole numbers, ``+ - * /`` and parentheses, in exact rational arithmetic.

Safe on any text: no eval, bounded length, literals and depth; what does not parse gives None at once.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 256
MAX_DEPTH = 32
_TOKEN = re.compile(r" *([0-9]{1,9}|[-+*/()])")


class Expression(NamedTuple):
    """What an expression says: its value, None if it divides by zero, and the numbers it uses in reading order."""

    value: Fraction | None
    numbers: list[int]


def parse_expression(text: str) -> Expression | None:
    """Read ``text``, with the usual precedence; None if it is no expression, or too long or deep to be a sane one.

    Signs are no numbers: ``-3 + 5`` is not accepted, as Countdown offers only the four binary operations.

    >>> parse_expression("(30 + 93) - 100")
    Expression(value=Fraction(23, 1), numbers=[30, 93, 100])
    >>> parse_expression("9 ** 9") is None
    True
    """
    tokens = _tokenise(text)
    if tokens is None:
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum(MAX_DEPTH)
    except _SyntaxError:
        return None
    return Expression(value, reader.numbers) if reader.is_at_end else None


class _SyntaxError(Exception):
    pass


def _tokenise(text: str) -> list[str] | None:
    if len(text) > MAX_CHARACTERS:
        return None
    text, tokens, position = text.rstrip(" "), [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Reader:
    """Recursive descent over tokens; ``depth`` counts the parentheses that may still open."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*reversed(tokens)]
        self.numbers: list[int] = []

    @property
    def is_at_end(self) -> bool:
        return not self._tokens

    def sum(self, depth: int) -> Fraction | None:
        value = self._product(depth)
        while self._next_is("+-"):
            operation = self._take()
            value = apply(operation, value, self._product(depth))
        return value

    def _product(self, depth: int) -> Fraction | None:
        value = self._atom(depth)
        while self._next_is("*/"):
            operation = self._take()
            value = apply(operation, value, self._atom(depth))
        return value

    def _atom(self, depth: int) -> Fraction | None:
        token = self._take()
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token != "(" or depth == 0:
            raise _SyntaxError
        value = self.sum(depth - 1)
        if self._take() != ")":
            raise _SyntaxError
        return value

    def _next_is(self, operations: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] in operations

    def _take(self) -> str:
        if not self._tokens:
            raise _SyntaxError
        return self._tokens.pop()


def apply(operation: str, left: Fraction | None, right: Fraction | None) -> Fraction | None:
    """``left operation right``, exactly; None (no value) where an operand has none or a division is by zero."""
    if left is None or right is None:
        return None
    match operation:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left / right if right else None
