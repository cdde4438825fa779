"""Difficulty, the history of methods, rejection, stop rules, and the two other styles."""

from __future__ import annotations

import pytest
from rapidfuzz.distance import Levenshtein

from lace_lightning.embedding import NgramEmbedder
from lace_lightning.synthesis.debate import debate
from lace_lightning.synthesis.difficulty import DifficultyOptions, measure
from lace_lightning.synthesis.rounds import converse
from lace_lightning.synthesis.sampling import SamplingOptions, sample
from lace_lightning.synthesis.solver import TeacherSolver
from lace_lightning.synthesis.teacher import Solution, Usage
from tests.synth_helpers import ScriptedTeacher, SumTask, row

LOOSE = dict(min_edit_distance=0.0, min_embedding_distance=0.0)


def solution(text: str, answer: str | None = "5", method: str = "", error: str = "", tokens: int = 0) -> Solution:
    return Solution(text, answer, method or text, Usage(1, 0, tokens), error)


def sampled(script, **options) -> tuple[dict, ScriptedTeacher]:
    teacher = ScriptedTeacher(script)
    given = SamplingOptions(**(dict(solutions=2, max_attempts=6, patience=6) | options))
    [done] = sample([row()], teacher, SumTask(), NgramEmbedder(), given, seed=0, width=4)
    return done, teacher


def outcomes(done: dict) -> list[str]:
    return [attempt["outcome"] for attempt in done["attempts"]]


# ---------------------------------------------------------------- difficulty


@pytest.mark.parametrize("right, removed", [(0, "too hard"), (1, None), (2, None), (3, "too easy"), (4, "too easy")])
def test_problems_solved_never_or_more_than_half_of_the_time_are_removed(right, removed):
    answers = ["5"] * right + ["6"] * (4 - right)
    solver = TeacherSolver(ScriptedTeacher([solution("t", answer) for answer in answers]))
    [done] = measure([row()], solver, SumTask(), DifficultyOptions(samples=4), seed=0, width=1)
    assert done["S"] == right / 4 and done.get("removed") == removed


def test_failed_requests_count_neither_for_nor_against():
    script = [solution("t", "5"), solution("", None, error="dead"), solution("t", "6"), solution("t", "seven")]
    solver = TeacherSolver(ScriptedTeacher(script))
    [done] = measure([row()], solver, SumTask(), DifficultyOptions(samples=4), seed=0, width=1)
    assert done["S"] == 1 / 3 and done["verdicts"] == ["correct", "wrong", "unparsable"]
    dead = TeacherSolver(ScriptedTeacher([solution("", None, error="dead")]))
    [lost] = measure([row()], dead, SumTask(), DifficultyOptions(samples=2), seed=0, width=1)
    assert lost["removed"] == "error" and lost["S"] is None


# ---------------------------------------------------------------- history, rejection, stopping


def test_the_teacher_hears_the_methods_of_all_accepted_solutions_right_and_wrong_and_of_no_other():
    script = [solution("aaaa aaaa", "5", "one"), solution("aaaa aaab", "5", "copy"), solution("zz yy", "6", "two")]
    _, teacher = sampled([*script, solution("kkk", "5", "three")], solutions=3, min_edit_distance=0.5)
    assert [query.avoid for query in teacher.queries] == [(), ("one",), ("one",), ("one", "two")]
    assert len({query.seed for query in teacher.queries}) == 4


def test_edit_distance_rejects_below_its_threshold_and_not_at_it():
    first, second = "abcdefghij", "abcdefghxy"  # 2 of 10 characters differ
    assert Levenshtein.normalized_distance(first, second) == 0.2
    script = [solution(first), solution(second), solution("another thing")]
    at, _ = sampled(script, min_edit_distance=0.2, min_embedding_distance=0.0)
    above, _ = sampled(script, min_edit_distance=0.21, min_embedding_distance=0.0)
    assert outcomes(at) == ["accepted", "accepted"]
    assert outcomes(above) == ["accepted", "edit distance", "accepted"]
    assert above["attempts"][1]["nearest"]["edit"] == 0.2


def test_embedding_distance_rejects_the_same_words_spelled_apart():
    script = [solution("ADD THE TWO"), solution("add   the   two"), solution("multiply by nine")]
    done, _ = sampled(script, min_edit_distance=0.1, min_embedding_distance=0.05)
    assert outcomes(done) == ["accepted", "embedding distance", "accepted"]
    assert done["attempts"][1]["nearest"] == {"edit": pytest.approx(0.8, abs=0.2), "embedding": 0.0}


@pytest.mark.parametrize(
    "bad, outcome",
    [
        (solution("", None, error="timeout"), "error"),
        (solution("a thought", None), "no answer"),
        (solution("  ", "5"), "no answer"),
        (solution("I say [[best]]", "5"), "unusable text"),
        (solution("on\n\n### Assessment\n5", "5"), "unusable text"),
        (solution("half \ud800", "5"), "unusable text"),
    ],
)
def test_what_can_be_no_thread_is_rejected_with_its_reason(bad, outcome):
    done, _ = sampled([bad, solution("a"), solution("b")], **LOOSE)
    assert outcomes(done) == [outcome, "accepted", "accepted"]


def test_sampling_goes_on_until_the_wanted_mix_is_there():
    script = [solution("a", "6"), solution("b", "7"), solution("c", "8"), solution("d", "5")]
    done, _ = sampled(script, min_correct=1, **LOOSE)
    assert done["stopped"] == "enough" and [a["verdict"] for a in done["attempts"]] == ["wrong"] * 3 + ["correct"]


@pytest.mark.parametrize(
    "options, stopped, number",
    [
        (dict(max_attempts=3), "max_attempts", 3),
        (dict(patience=2), "patience", 3),
        (dict(max_tokens=25), "max_tokens", 3),
    ],
)
def test_each_stop_rule_stops(options, stopped, number):
    done, teacher = sampled([solution("the same again", tokens=10)], **options)
    assert done["stopped"] == stopped and len(teacher.queries) == number == len(done["attempts"])


def test_a_problem_without_an_accepted_solution_is_removed():
    done, _ = sampled([solution("", None, error="no")])
    assert done["removed"] == "no solution accepted"


def test_resampling_has_no_history_and_rejects_no_copies():
    done, teacher = sampled([solution("the same")], style="resample", solutions=4)
    assert outcomes(done) == ["accepted"] * 4
    assert all(query.avoid == () for query in teacher.queries)


# ---------------------------------------------------------------- debates


def test_in_a_debate_each_thread_reads_what_all_others_wrote_in_earlier_rounds_and_nothing_later():
    teacher = ScriptedTeacher()
    options = SamplingOptions(style="debate", solutions=3, rounds=3)
    [done] = debate([row()], teacher, SumTask(), options, seed=0, width=1)
    for number, turns in enumerate(teacher.turns):
        for n, turn in enumerate(turns, start=1):
            assert set(turn.others) == {1, 2, 3} - {n} and len(turn.own) == number
            for other, parts in turn.others.items():
                written = [f"part {k} of seed {teacher.turns[k][other - 1].seed}" for k in range(number)]
                assert list(parts) == written
            assert turn.is_last == (number == 2)
    assert len(teacher.turns) == 3 and outcomes(done) == ["accepted"] * 3
    assert done["attempts"][1]["text"].count("part") == 3 and done["attempts"][1]["verdict"] == "correct"


def test_a_debate_whose_thread_fails_is_removed_whole():
    class Mute(ScriptedTeacher):
        def debate(self, turns):
            good = super().debate(turns)
            return [Solution("", None, error="cut"), *good[1:]] if turns[0].is_last else good

    options = SamplingOptions(style="debate", solutions=2, rounds=2)
    [done] = debate([row()], Mute(), SumTask(), options, seed=0, width=1)
    assert done["removed"] and outcomes(done) == ["error", "other thread failed"]


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("width", [1, 2, 5, 50])
def test_talks_of_any_length_get_their_own_replies_at_any_width(width):
    asked = []

    def talk(number):
        heard = []
        for k in range(number):
            heard.append((yield (number, k)))
        return number, heard

    def ask(questions):
        asked.append(len(questions))
        return [f"{number}/{k}" for number, k in questions]

    done = dict(converse((talk(n) for n in range(7)), ask, width))
    assert done == {n: [f"{n}/{k}" for k in range(n)] for n in range(7)}
    assert max(asked) <= width and sum(asked) == 21
