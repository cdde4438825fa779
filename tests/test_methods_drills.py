"""Countdown's drills: what they claim is true, they are read back as methods read them, and splits hold."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pytest

from lace_lightning.evaluation.methods.choice import claims, parse_headings, parse_index, parse_rating
from lace_lightning.puzzles import Countdown, CountdownDrills
from lace_lightning.puzzles.countdown_drills import SHARES
from lace_lightning.puzzles.expression import parse_expression
from lace_lightning.puzzles.word_puzzle import split_of
from lace_lightning.tasks import FollowUp, Verdict
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.schema import Tag
from tests.method_helpers import ScriptedPolicy
from tests.puzzle_helpers import decoded_thread

COUNT = 1200
PUZZLES = {
    "tries 1": CountdownDrills(tries=1),
    "tries 2": CountdownDrills(tries=2),
    "two numbers": CountdownDrills(numbers=2, tries=1),
    "four numbers": CountdownDrills(numbers=4, max_number=20, tries=1, seed=3),
}


@pytest.fixture(scope="module")
def drills():
    """(kind, trace) of each puzzle."""
    count = {"four numbers": 150, "two numbers": 400}
    return {
        name: [(kind_of(trace), trace) for trace in (puzzle.trace(i, 1) for i in range(count.get(name, COUNT)))]
        for name, puzzle in PUZZLES.items()
    }


def kind_of(trace):
    word = trace.problem.text.partition("->")[2].split()[1:2]
    return word[0] if word else "solve"


def reading(trace):
    """The thread as decoding reads it back, and what stands in the prompt after the kind's word."""
    (thread,) = trace.threads
    written = ScriptedPolicy(lambda *asked: "")._thread(f"{thread.text} ; {thread.answer} {thread.tag}")
    shown = trace.problem.text.partition(f" {kind_of(trace)}")[2].strip()
    return written, shown


def is_true(equation):
    left, right = equation.split(" = ")
    return parse_expression(left).value == int(right)


def equations_in(text):
    """Equations of a thought, without first steps and verdicts."""
    words = " ".join(word for word in text.split() if word not in ("hit", "miss") and word[0] not in "abcd")
    return [part.strip() for part in words.split(" , ") if "=" in part]


def tries_of(thought):
    tries = thought.replace("hit", "hit|").replace("miss", "miss|").strip("| ").split("|")
    return [attempt.strip() for attempt in tries]


def check_attempt(attempt, trace):
    """A try's equations are true, use the numbers, begin with its first step, and its verdict holds."""
    numbers, target = trace.problem.facts["numbers"], trace.problem.facts["target"]
    _, move, *_, verdict = attempt.split()
    first, *rest = equations = equations_in(attempt)
    assert all(map(is_true, equations)) and len(equations) == len(numbers) - 1
    operands = [numbers["abcd".index(letter)] for letter in move[:2]]
    assert sorted(map(int, first.split()[:3:2])) == sorted(operands) and first.split()[1] == move[2]
    assert (verdict == "hit") == (int(equations[-1].split()[-1]) == target)
    assert rest or len(numbers) == 2


@pytest.mark.parametrize("name", PUZZLES)
def test_every_solution_calculates_truly_and_says_truly_whether_it_hit(name, drills):
    puzzle = PUZZLES[name]
    for kind, trace in drills[name]:
        if kind not in ("solve", "refine", "merge", "branch"):
            continue
        thread, _ = reading(trace)
        for attempt in tries_of(thread.thought):
            check_attempt(attempt, trace)
        (verdict,) = puzzle.judge([(trace.problem, thread)])
        assert (verdict is Verdict.CORRECT) == thread.thought.endswith("hit") == claims(thread)
        assert thread.tag in (Tag.BEST, Tag.FAIL) and verdict is not Verdict.UNPARSABLE


@pytest.mark.parametrize("name", PUZZLES)
def test_steps_go_on_truly_and_the_last_one_answers(name, drills):
    for _, trace in (one for one in drills[name] if one[0] == "step"):
        thread, shown = reading(trace)
        numbers = trace.problem.facts["numbers"]
        done = equations_in(shown)
        (step,) = equations_in(thread.thought)
        left = Counter(map(Fraction, numbers))
        for equation in [*done, step]:
            assert is_true(equation)
            a, _, b, _, value = equation.split()
            left.subtract([Fraction(a), Fraction(b)])
            assert min(left.values()) >= 0, "a step uses a number that is not there"
            left[Fraction(value)] += 1
        is_last = len(done) == len(numbers) - 2
        assert bool(thread.answer) == is_last and (thread.tag is Tag.SUCCESS) != is_last
        if is_last:
            value = parse_expression(thread.answer).value
            assert value == int(step.split()[-1]) and claims(thread) == (value == trace.problem.facts["target"])


@pytest.mark.parametrize("name", PUZZLES)
def test_ratings_are_right_about_whether_the_target_can_be_reached(name, drills):
    """Against the way that is shown to go on, and against all ways for what is said to be lost."""
    puzzle = PUZZLES[name]
    ratings = Counter()
    for _, trace in (one for one in drills[name] if one[0] == "rate"):
        thread, shown = reading(trace)
        rating, target = parse_rating(thread), trace.problem.facts["target"]
        start, onward = equations_in(shown), equations_in(thread.thought)
        assert rating in (0.0, 1.0) and (thread.thought.split()[-1] == "hit") == (rating == 1.0)
        assert all(map(is_true, onward)) and len(start) + len(onward) == puzzle.numbers - 1
        if rating == 1.0:
            assert all(map(is_true, start)) and int([*start, *onward][-1].split()[-1]) == target
        elif all(map(is_true, start)):
            for way in puzzle._all_ways(trace.problem.facts["numbers"]):
                words = [f"{s.left.value} {s.operation} {s.right.value} = {s.value}" for s in way]
                assert words[: len(start)] != start or way[-1].value != target
        ratings[rating] += 1
    assert min(ratings.values()) > 0.1 * sum(ratings.values())


@pytest.mark.parametrize("name", PUZZLES)
def test_judges_are_right_about_every_candidate_also_about_those_that_lie(name, drills):
    lies = 0
    for _, trace in (one for one in drills[name] if one[0] == "judge"):
        thread, shown = reading(trace)
        target = trace.problem.facts["target"]
        candidates = [part for k, part in split_numbered(shown)]
        verdicts = thread.thought.split()
        assert len(verdicts) == len(candidates)
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            last = tries_of(candidate)[-1]
            holds = all(map(is_true, equations_in(last))) and int(equations_in(last)[-1].split()[-1]) == target
            assert (verdict == "hit") == holds
            lies += candidate.endswith("hit") and not holds
        index = parse_index(thread, len(candidates))
        assert index == (verdicts.index("hit") if "hit" in verdicts else 0) and claims(thread) == ("hit" in verdicts)
    assert lies > 0 or name == "four numbers"  # of which there are few


def split_numbered(shown):
    """(number, text) of ``1 … , 2 …``; a comma also stands between equations."""
    parts, number = [], 1
    while shown:
        head, mark, rest = shown.removeprefix(f"{number} ").partition(f" , {number + 1} ab")
        for letters in ("ac", "bc", "ad", "bd", "cd"):
            other = shown.removeprefix(f"{number} ").partition(f" , {number + 1} {letters}")
            if other[1] and len(other[0]) < len(head):
                head, mark, rest = other
        parts.append((number, head))
        number += 1
        shown = f"{mark.removeprefix(' , ')}{rest}" if mark else ""
    return parts


def test_who_reads_attempts_repeats_the_first_true_hit_and_else_tries_what_nobody_tried(drills):
    repeated = fresh = 0
    for kind, trace in drills["tries 1"]:
        if kind not in ("refine", "merge"):
            continue
        thread, shown = reading(trace)
        attempts = tries_of(shown)
        attempts = [attempt.removeprefix(", ") for attempt in attempts]
        true_hits = [a for a in attempts if a.endswith("hit") and all(map(is_true, equations_in(a)))]
        if true_hits:
            assert thread.thought == true_hits[0]
            repeated += 1
        else:
            assert thread.thought.split()[1] not in {attempt.split()[1] for attempt in attempts}
            fresh += 1
    assert min(repeated, fresh) > 20


def test_forks_open_different_first_steps_and_a_branch_begins_with_its_heading(drills):
    puzzle = PUZZLES["tries 1"]
    for kind, trace in drills["tries 1"]:
        thread, shown = reading(trace)
        if kind == "fork":
            moves = set(puzzle._ways(trace.problem.facts["numbers"]))
            headings = parse_headings(thread)
            assert len(headings) == min(4, len(moves)) and set(headings) <= moves and not thread.answer
        if kind == "branch":
            assert thread.thought.split()[:2] == [shown, shown]


def test_kinds_have_their_stated_shares(drills):
    counts = Counter(kind for kind, _ in drills["tries 1"])
    assert set(counts) == set(SHARES) == {"solve", *FollowUp}
    for kind, share in SHARES.items():
        assert counts[kind] / COUNT == pytest.approx(share, abs=0.04)
    only = CountdownDrills(shares={"judge": 2.0})
    assert {kind_of(only.trace(i, 1)) for i in range(30)} == {"judge"}


@pytest.mark.parametrize("name", PUZZLES)
def test_the_vocabulary_is_countdowns_and_covers_every_drill(name, drills):
    puzzle = PUZZLES[name]
    plain = Countdown(puzzle.numbers, puzzle.max_number, puzzle.tries)
    assert puzzle.words == plain.words
    collator = TraceCollator(puzzle.tokenizer(), puzzle.template, num_threads=1, max_length=256)
    for _, trace in drills[name]:
        collator.check(trace)


def test_drills_fit_into_the_columns_that_the_shipped_config_has(drills):
    puzzle = PUZZLES["tries 1"]
    collator = TraceCollator(puzzle.tokenizer(), puzzle.template, num_threads=1, max_length=144)
    assert (
        max(sum(map(len, (p, t[0].ids))) for p, t in (collator._encode(trace) for _, trace in drills["tries 1"])) <= 144
    )


def test_splits_and_excluded_problems_are_respected(tmp_path):
    def key(problem):
        return (*sorted(problem.facts["numbers"]), problem.facts["target"])

    small = CountdownDrills(max_number=9)
    for split in ("train", "test"):
        for i in range(100):
            facts = small.trace(i, 1, split).problem.facts
            numbers = " ".join(map(str, sorted(facts["numbers"])))
            assert split_of(f"countdown {numbers} -> {facts['target']}") == split
    held_out = {key(small.trace(i, 1).problem) for i in range(60)}
    rows = [{"numbers": [*own[:-1]], "target": own[-1]} for own in held_out]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_out & {key(small.trace(i, 1).problem) for i in range(60, 400)}
    excluding = CountdownDrills(max_number=9, exclude=str(path))
    assert not held_out & {key(excluding.trace(i, 1).problem) for i in range(400)}


def test_drills_are_functions_of_seed_and_index():
    assert CountdownDrills(seed=1).trace(5, 1) == CountdownDrills(seed=1).trace(5, 1)
    assert CountdownDrills(seed=1).trace(5, 1) != CountdownDrills(seed=2).trace(5, 1)


def test_follow_ups_of_what_a_model_might_write_parse_or_are_refused():
    for answer in ("10.5", "11", "-1", "٣", "1e1", "ten", "", None):
        assert parse_rating(decoded_thread(answer)) is None
    assert [parse_rating(decoded_thread(a)) for a in ("0", "2.5", "10")] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shares": {}}, "shares="),
        ({"shares": {"solve": -1.0}}, "none negative"),
        ({"shares": {"solve": float("nan")}}, "none negative"),
        ({"shares": {"sing": 1.0}}, "sing"),
        ({"candidates": 1}, "candidates="),
        ({"attempts": 0}, "attempts="),
        ({"false_claims": 1.5}, "false_claims=1.5"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, reason):
    with pytest.raises(ValueError, match=reason):
        CountdownDrills(**options)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="num_threads=4.*set 1"):
        CountdownDrills().trace(0, 4)
