"""What holds for verdicts on all texts: generated numbers against Python's fractions, and any text at all."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lace_lightning.tasks import Verdict
from lace_lightning.verification import Kind, Reference, Verifier
from lace_lightning.verification.sight import Question, look
from lace_lightning.verification.spelling import (
    is_readable,
    letters,
    plain_numbers,
    split_values,
    tidy,
    without_unit,
    without_words,
    words,
)
from tests.fuzz_targets import REFERENCES
from tests.hand_built import RIGHT, WRONG

INTEGERS = st.integers(-(10**9), 10**9)
FRACTIONS = st.fractions(min_value=-999, max_value=999, max_denominator=999)
PIECES = [r"\frac", r"\sqrt", "{", "}", "2", "x", "^", r"\left(", r"\right)", "$", r"\boxed{", ",", "=", " "]
ANYTHING = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(list("\\{}()[]$^_!/*+-=,.;: 0123456789abx\n")), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
)
quietly = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def verifier():
    with Verifier(num_workers=1, time_limit=2.0) as verifier:
        yield verifier


def spelled(value: Fraction, style: int) -> str:
    """A fraction in one of the ways that people write it."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    styles = [
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{top}}}{{{bottom}}}",
        rf"{sign}\tfrac{{{top}}}{{{bottom}}}",
        rf"$\frac{{{sign}{top}}}{{{bottom}}}$",
        f"{sign}{top}/{bottom}",
        rf"\boxed{{{sign}{top} / {bottom}}}",
        rf" \( {sign}\frac{{ {top} }}{{ {bottom} }} \) ",
        rf"x = {sign}\frac{{{top}}}{{{bottom}}}.",
        rf"\left({sign}\frac{{{2 * top}}}{{{2 * bottom}}}\right)",
    ]
    return styles[style % len(styles)]


@quietly
@given(FRACTIONS, st.integers(0, 8), st.integers(0, 8))
def test_a_fraction_is_right_however_it_is_spelled(verifier, value, style, other):
    assert verifier.verify([(spelled(value, style), spelled(value, other))]) == [RIGHT]


@quietly
@given(FRACTIONS, FRACTIONS, st.integers(0, 8), st.integers(0, 8))
def test_two_fractions_are_equal_where_python_says_so(verifier, gold, answer, style, other):
    expected = RIGHT if gold == answer else WRONG
    assert verifier.verify([(spelled(gold, style), spelled(answer, other))]) == [expected]


@quietly
@given(
    INTEGERS, INTEGERS, st.sampled_from(["{}", "{:,}", "${:,}", "{:,}.00", "{} dollars", r"{}\text{{ cm}}", " **{}** "])
)
def test_two_integers_are_equal_where_python_says_so(verifier, gold, answer, spelling):
    pairs = [(str(gold), spelling.format(gold)), (str(gold), spelling.format(answer))]
    assert verifier.verify(pairs) == [RIGHT, RIGHT if gold == answer else WRONG]


@quietly
@given(st.lists(FRACTIONS, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_values_are_right_in_any_order_and_wrong_if_one_lacks_or_changes(verifier, values, random):
    reference = Reference(", ".join(map(str, values)), Kind.VALUES)
    shuffled = random.sample(values, len(values))
    answers = [shuffled, shuffled[1:], [shuffled[0] + 1, *shuffled[1:]], [*shuffled, shuffled[0]]]
    verdicts = verifier.verify([(reference, ", ".join(map(str, answer))) for answer in answers])
    assert verdicts == [RIGHT, WRONG, WRONG, WRONG]


@quietly
@given(FRACTIONS, FRACTIONS)
def test_within_the_tolerance_is_right_and_beyond_it_wrong(verifier, gold, distance):
    reference = Reference(str(gold), tolerance=0.25)
    expected = RIGHT if abs(distance) <= Fraction(1, 4) else WRONG
    assert verifier.verify([(reference, str(gold + distance))]) == [expected]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(REFERENCES), ANYTHING), max_size=6), st.randoms(use_true_random=False))
def test_no_text_raises_and_neither_order_nor_batch_matters(verifier, pairs, random):
    together = dict(zip(pairs, verifier.verify(pairs), strict=True))
    assert all(isinstance(verdict, Verdict) for verdict in together.values())
    shuffled = random.sample(pairs, len(pairs))
    assert verifier.verify(shuffled) == [together[pair] for pair in shuffled]
    assert [verifier.verify([pair]) for pair in pairs[:2]] == [[together[pair]] for pair in pairs[:2]]


@settings(deadline=None, max_examples=300)
@given(ANYTHING)
def test_no_text_raises_in_what_is_done_at_sight(text):
    for reference in REFERENCES:
        assert isinstance(look(reference, text), Verdict | Question)
    for function in (is_readable, tidy, plain_numbers, split_values, without_words, letters, words):
        function(text)
    without_unit(text, "km")


@settings(deadline=None, max_examples=300)
@given(ANYTHING)
def test_a_readable_text_is_right_against_itself_as_mathematics(text):
    if is_readable(text):
        assert look(Reference(text), text) == RIGHT


@settings(deadline=None, max_examples=300)
@given(
    st.text("0123456789abx+-/^() ", min_size=1).map(str.strip),
    st.lists(
        st.sampled_from([" {} ", "\n{}", "${}$", r"\[{}\]", r"\boxed{{{}}}", "**{}**", "{}.", "= {}"]), max_size=1
    ),
    st.sampled_from(["{}", "The answer is {}", "$$ {} $$"]),
)
def test_what_surrounds_an_answer_is_taken_off(text, inner, outer):
    for wrapper in [*inner, outer]:
        wrapped = wrapper.format(text)
        assert tidy(wrapped) == tidy(text) == " ".join(text.split())
