"""Find: triples, traces and the judge."""

import pytest

from lace_lightning.puzzles import Find
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem
from tests.puzzle_helpers import HOSTILE_ANSWERS, decoded_thread


def test_traces_calculate_truly_and_their_verdicts_hold():
    puzzle = Find(tries=3)
    for i in range(200):
        trace = puzzle.trace(i, 4)
        a, b, p = (trace.problem.facts[key] for key in "abp")
        assert trace.problem.text == f"find {a} x = {b} mod {p}"
        for thread in trace.threads:
            words = thread.text.split()
            assert len(words) == 3 * 4 and thread.forced == ()
            for x, product, verdict in zip(words[1::4], words[2::4], words[3::4], strict=True):
                assert 0 < int(x) < p
                assert int(product) == a * int(x) % p
                assert (verdict == "hit") == (a * int(x) % p == b)
            (judged,) = puzzle.judge([(trace.problem, decoded_thread(thread.answer))])
            assert (judged == Verdict.CORRECT) == (words[-1] == "hit")


def test_reference_answers_solve_their_congruence():
    problems = [Find(primes=[5, 7, 31]).problem(i) for i in range(300)]
    assert all(int(q.answer) * q.facts["a"] % q.facts["p"] == q.facts["b"] for q in problems)
    assert {q.facts["p"] for q in problems} == {5, 7, 31}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("4", Verdict.CORRECT),
        ("11", Verdict.CORRECT),
        ("5", Verdict.WRONG),
        ("0", Verdict.WRONG),
        ("4 x", Verdict.UNPARSABLE),
    ],
)
def test_any_solution_of_the_congruence_is_correct(answer, verdict):
    """3·4 = 12 ≡ 5 (mod 7), and so does 11."""
    problem = Problem("a", "", "4", {"a": 3, "b": 5, "p": 7})
    assert Find().judge([(problem, decoded_thread(answer))]) == [verdict]


def test_hostile_answers_are_unparsable():
    puzzle = Find()
    items = [(puzzle.problem(0), decoded_thread(answer)) for answer in HOSTILE_ANSWERS]
    assert set(puzzle.judge(items)) == {Verdict.UNPARSABLE}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"primes": [9]}, r"\[9\] are not prime"),
        ({"primes": [37]}, "primes="),
        ({"primes": []}, "primes="),
        ({"primes": [2]}, "without problems"),
        ({"tries": 0}, "tries="),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        Find(**options)
