"""Countdown: solver, instances, traces, third-party problems and the judge."""

import itertools
import json
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from lace_lightning.puzzles import Countdown
from lace_lightning.puzzles.countdown_solver import Naturals, paths, rationals, solutions, terms_of
from lace_lightning.puzzles.expression import parse_expression
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem
from tests.puzzle_helpers import HOSTILE_ANSWERS, decoded_thread

THIRD_PARTY = Path(__file__).parents[2] / "shared/data/math/countdown_cd3.jsonl"


@pytest.fixture(scope="module")
def third_party() -> list[Problem]:
    if not THIRD_PARTY.exists():
        pytest.skip(f"{THIRD_PARTY.name} is not beside this checkout")
    rows = [json.loads(line) for line in THIRD_PARTY.read_text(encoding="utf-8").splitlines()]
    facts = [{key: row[key] for key in ("numbers", "target")} for row in rows]
    return [Problem(row["id"], row["problem"], row["answer"], fact) for row, fact in zip(rows, facts, strict=True)]


def _brute_force(numbers):
    """Every value that any order, operations and both ways to set parentheses give for three numbers, by eval."""
    values = set()
    for a, b, c in itertools.permutations([f"Fraction({number})" for number in numbers]):
        for p, q in itertools.product("+-*/", repeat=2):
            for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                try:
                    values.add(eval(text, {"Fraction": Fraction}))
                except ZeroDivisionError:
                    continue
    return values


@pytest.mark.parametrize("numbers", [[3, 3, 8], [1, 1, 1], [30, 100, 93], [2, 4, 8], [5, 5, 10], [0, 1, 2]])
def test_solver_reaches_exactly_what_brute_force_reaches(numbers):
    reachable = _brute_force(numbers)
    assert {way[-1].value for way in paths(terms_of(numbers), rationals)} == reachable
    for target in [*range(-5, 30), *sorted(reachable)[::7]]:
        found = list(solutions(numbers, target))
        assert bool(found) == (target in reachable)
        for text in found:
            expression = parse_expression(text)
            assert expression.value == target and sorted(expression.numbers) == sorted(numbers)


def test_solver_finds_what_only_fractions_reach():
    """8 / (3 - 8 / 3) = 24 is the classic."""
    assert "8 / ( 3 - ( 8 / 3 ) )" in list(solutions([3, 3, 8, 8], 24))
    assert list(solutions([3, 3, 8, 8], 24, Naturals(10_000))) == []


def test_natural_ways_stay_natural_and_bounded_and_miss_no_target_that_such_ways_reach():
    rng = Random(0)
    for _ in range(50):
        numbers = [rng.randint(1, 20) for _ in range(3)]
        free = [way for way in paths(terms_of(numbers), rationals) if all(_is_natural(s.value) for s in way)]
        bounded = list(paths(terms_of(numbers), Naturals(40)))
        assert all(type(step.value) is int and 0 <= step.value <= 40 for way in bounded for step in way)
        assert {way[-1].value for way in bounded} == {
            way[-1].value for way in free if all(step.value <= 40 for step in way)
        }


def _is_natural(value):
    return value.denominator == 1 and value >= 0


def test_all_third_party_instances_are_solvable_worded_and_judged(third_party):
    puzzle, tokenizer = Countdown(), Countdown().tokenizer()
    for problem in third_party:
        adapted = puzzle.adapt(problem)
        numbers, target = problem.facts["numbers"], problem.facts["target"]
        assert adapted.text == " ".join(map(str, numbers)) + f" -> {target}"
        assert tokenizer.unk_token_id not in puzzle.template.encode_prompt(adapted.text, tokenizer)
        own = next(solutions(numbers, target))
        items = [(adapted, decoded_thread(answer)) for answer in (problem.answer, own)]
        assert puzzle.judge(items) == [Verdict.CORRECT] * 2


def test_excluded_instances_are_never_generated_in_any_order_of_their_numbers(tmp_path):
    """Small numbers, so that collisions are certain without the option."""
    plain = [Countdown(max_number=9).problem(i) for i in range(300)]
    rows = [problem.facts for problem in plain[:150]]
    shuffled = [{"numbers": sorted(row["numbers"], reverse=True), "target": row["target"]} for row in rows]
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(json.dumps(row if k % 2 else {"facts": row}) for k, row in enumerate(shuffled)) + "\n\n")

    def keys(problems):
        return {(*sorted(p.facts["numbers"]), p.facts["target"]) for p in problems}

    excluded = keys(plain[:150])
    assert keys(plain[150:]) & excluded
    assert not keys(Countdown(max_number=9, exclude=str(path)).problem(i) for i in range(300)) & excluded


def test_the_third_party_file_can_be_excluded(third_party):
    excluded = Countdown(exclude=str(THIRD_PARTY))._excluded
    assert len(excluded) == len({(*sorted(p.facts["numbers"]), p.facts["target"]) for p in third_party})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line 2: not JSON"),
        ('{"numbers": [1, 2]}', "target=None"),
        ("3", "numbers=None"),
        ('{"numbers": "12", "target": 3}', "'12'"),
    ],
)
def test_a_bad_row_of_the_excluded_file_is_named(tmp_path, row, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"numbers": [1, 2, 3], "target": 6}\n' + row)
    with pytest.raises(ValueError, match="exclude=.*line 2") as error:
        Countdown(exclude=str(path))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "numbers=None"),
        ({"numbers": [1, 2], "target": 3}, "numbers=3"),
        ({"numbers": [1, 2, 101], "target": 3}, "max_number=100"),
        ({"numbers": [1, 2, 3], "target": 101}, "max_number=100"),
        ({"numbers": [1, 2, -3], "target": 3}, "positive"),
        ({"numbers": [1, 2, 3], "target": 1.5}, "positive"),
    ],
)
def test_a_problem_the_vocabulary_does_not_cover_is_refused_by_id(facts, reason):
    with pytest.raises(ValueError, match="problem 'x-7'") as error:
        Countdown().adapt(Problem("x-7", "", "", facts))
    assert reason in str(error.value)


@pytest.mark.parametrize("puzzle", [Countdown(), Countdown(numbers=2, tries=1), Countdown(numbers=4, max_number=20)])
def test_traces_calculate_truly_and_their_verdicts_hold(puzzle):
    for i in range(40):
        trace = puzzle.trace(i, 4)
        numbers, target = trace.problem.facts["numbers"], trace.problem.facts["target"]
        for thread in trace.threads:
            tries = thread.text.replace("hit", "hit|").replace("miss", "miss|").rstrip("|").split("|")
            assert len(tries) == puzzle.tries and thread.forced == ()
            for attempt in tries:
                _, committed, *equations, verdict = attempt.split()
                pairs = [equation.split(" = ") for equation in " ".join(equations).split(" , ")]
                assert all(eval(left) == int(right) for left, right in pairs)
                operands = [numbers["abcd".index(letter)] for letter in committed[:2]]
                first = pairs[0][0].split()
                assert sorted(map(int, first[::2])) == sorted(operands) and first[1] == committed[2]
                assert (verdict == "hit") == (int(pairs[-1][1]) == target)
            (judged,) = puzzle.judge([(trace.problem, decoded_thread(thread.answer))])
            assert (judged == Verdict.CORRECT) == (verdict == "hit")


def test_tries_have_equal_lengths_so_that_threads_stay_aligned():
    lengths = {len(thread.text.split()) for i in range(100) for thread in Countdown().trace(i, 4).threads}
    assert lengths == {2 * 14}


def test_instances_resemble_the_third_party_ones(third_party):
    """Share of instances that cannot be solved by + and - alone: 27 of 256 there."""

    def share(all_facts):
        hard = [not _solvable_by_sums(f["numbers"], f["target"]) for f in all_facts]
        return sum(hard) / len(hard)

    assert share([p.facts for p in third_party]) == 27 / 256
    assert share([Countdown().problem(i).facts for i in range(500)]) == pytest.approx(27 / 256, abs=0.06)


def _solvable_by_sums(numbers, target):
    signs = itertools.product((1, -1), repeat=3)
    return any(sum(s * n for s, n in zip(some, numbers, strict=True)) == target for some in signs)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("( 30 + 93 ) - 100", Verdict.CORRECT),
        ("30-(100-93)", Verdict.CORRECT),
        ("30 - 100 + 93", Verdict.CORRECT),
        ("30 + 93 + 100", Verdict.WRONG),
        ("23", Verdict.WRONG),
        ("30 - 7", Verdict.WRONG),
        ("30 + 93 - 100 + 30 - 30", Verdict.WRONG),
        ("(30 + 93 - 100) / (30 - 30)", Verdict.WRONG),
        ("30 + 93 - 100 = 23", Verdict.UNPARSABLE),
        ("-100 + 93 + 30", Verdict.UNPARSABLE),
        ("( 30 + 93 - 100", Verdict.UNPARSABLE),
    ],
)
def test_judge_by_hand(answer, verdict):
    problem = Problem("a", "30 100 93 -> 23", "", {"numbers": [30, 100, 93], "target": 23})
    assert Countdown().judge([(problem, decoded_thread(answer))]) == [verdict]


def test_each_copy_of_a_repeated_number_must_be_used():
    problem = Problem("a", "", "", {"numbers": [5, 5, 10], "target": 20})
    answers = ["5 + 5 + 10", "10 + 10", "5 * 10 / 5"]
    assert Countdown().judge([(problem, decoded_thread(a)) for a in answers]) == [
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.WRONG,
    ]


def test_hostile_answers_are_unparsable():
    puzzle = Countdown()
    items = [(puzzle.problem(0), decoded_thread(answer)) for answer in HOSTILE_ANSWERS]
    assert set(puzzle.judge(items)) == {Verdict.UNPARSABLE}


def test_a_domain_without_problems_ends_with_the_options_to_change():
    with pytest.raises(RuntimeError, match="max_number=1 .*raise max_number"):
        [Countdown(numbers=2, max_number=1).problem(i, split) for i in range(3) for split in ("train", "test")]


@pytest.mark.parametrize(
    "options", [{"numbers": 5}, {"numbers": 1}, {"tries": 0}, {"max_value": 99}, {"max_number": 0}]
)
def test_options_out_of_range_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        Countdown(**options)
