"""The safe reader of arithmetic expressions."""

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lace_lightning.puzzles.expression import MAX_CHARACTERS, MAX_DEPTH, Expression, parse_expression
from tests.puzzle_helpers import HOSTILE_ANSWERS

NUMBERS = st.integers(0, 999).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", " - ", "*", " / "]), inner).map("".join), inner.map("({})".format)
    ),
    max_leaves=12,
).filter(lambda text: len(text) <= MAX_CHARACTERS)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_values_and_numbers_agree_with_python(text):
    literals = re.findall("[0-9]+", text)
    try:
        expected = eval(re.sub("([0-9]+)", r"Fraction(\1)", text), {"Fraction": Fraction})  # made here, not read
    except ZeroDivisionError:
        expected = None
    assert parse_expression(text) == Expression(expected, [int(literal) for literal in literals])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8-5-2", 1),
        ("8/4/2", 1),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("1/3", Fraction(1, 3)),
        ("3 - 8", -5),
        ("1/(2-2)", None),
        (" ((7)) ", 7),
    ],
)
def test_precedence_associativity_and_exactness_by_hand(text, value):
    expression = parse_expression(text)
    assert expression is not None and expression.value == value


@pytest.mark.parametrize(
    "text",
    ["1+", "*1", "1 2", "()", "(1", "1)", "1++2", "-1+2", "--1", "2(3)", "1//2", "2**3", "1 + x", "1,000", "1\t+ 2"],
)
def test_text_that_is_no_expression_is_none(text):
    assert parse_expression(text) is None


@settings(deadline=None)
@given(st.text())
def test_no_text_raises(text):
    parse_expression(text)


def test_hostile_texts_are_none_at_once():
    start = time.perf_counter()
    for text in HOSTILE_ANSWERS:
        assert text is None or parse_expression(text) is None
    assert time.perf_counter() - start < 1


def test_limits_are_where_they_are_said_to_be():
    def nested(depth):
        return "(" * depth + "1" + ")" * depth

    assert parse_expression(nested(MAX_DEPTH)) is not None
    assert parse_expression(nested(MAX_DEPTH + 1)) is None
    assert parse_expression("999999999") is not None
    assert parse_expression("1000000000") is None
    assert parse_expression("1+" * (MAX_CHARACTERS // 2 - 1) + "11") is not None
    assert parse_expression("1+" * (MAX_CHARACTERS // 2) + "1") is None
