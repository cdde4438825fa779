"""From solutions to traces: compression verified again, ranking twice, tags, and which threads are taken."""

from __future__ import annotations

from itertools import permutations

import pytest

from lace_lightning.synthesis.assembly import AssemblyOptions, assemble, to_trace
from lace_lightning.synthesis.compression import CompressionOptions, TokenCounter, compress, steps_of
from lace_lightning.synthesis.judging import JudgingOptions, assign_tags, combined, disagreement, rank
from lace_lightning.synthesis.teacher import Solution, Usage
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.schema import Tag
from lace_lightning.verification import MathTask
from tests.synth_helpers import ScriptedTeacher, SumTask, row

LONG = "one two three.\n\nfour five six.\n\nseven eight nine."  # 12 words and signs
TIGHT = CompressionOptions(above=11, below=6, tries=2)


def attempt(text: str, answer: str = "5", verdict: str = "correct", **more) -> dict:
    return dict(text=text, answer=answer, method="m", seed=1, verdict=verdict, outcome="accepted") | more


def compressed(attempts, shorter, options=TIGHT, task=None) -> tuple[dict, ScriptedTeacher]:
    teacher = ScriptedTeacher(shorter=[Solution(*pair, usage=Usage(1, 2, 3)) for pair in shorter])
    [done] = compress([row(attempts=attempts)], teacher, task or SumTask(), options, seed=0, width=1)
    return done, teacher


# ---------------------------------------------------------------- compression


def test_only_solutions_above_the_limit_are_rewritten_and_the_teacher_gets_their_steps():
    done, teacher = compressed([attempt("short one"), attempt(LONG)], [("one to nine", "5")])
    assert [solution["text"] for solution in done["solutions"]] == ["short one", "one to nine"]
    [draft] = teacher.drafts
    assert draft.steps == ("one two three.", "four five six.", "seven eight nine.")
    assert (draft.answer, draft.max_tokens) == ("5", 6)
    [entry] = done["compressions"]
    assert (entry["before"], entry["after"], entry["outcomes"]) == (12, 3, ["accepted"])
    assert CompressionOptions().above == 8000 and CompressionOptions().below == 3000


@pytest.mark.parametrize(
    "old, new, outcome",
    [
        (("5", "correct"), ("too short to say", "6"), "other verdict"),
        (("6", "wrong"), ("corrected it", "5"), "other verdict"),
        (("6", "wrong"), ("another error", "7"), "other answer"),
        (("5", "correct"), ("six words are one too many", "5"), "too long"),
        (("5", "correct"), ("no answer", None), "no answer"),
        (("5", "correct"), ("[[fail]] ha", "5"), "unusable text"),
    ],
)
def test_a_new_wording_that_changes_anything_but_the_wording_is_refused_twice_and_then_dropped(old, new, outcome):
    done, teacher = compressed([attempt(LONG, *old), attempt("short")], [new])
    assert [solution["text"] for solution in done["solutions"]] == ["short"]
    assert done["compressions"][0]["outcomes"] == [outcome] * 2 and done["compressions"][0]["after"] is None
    assert done["compressions"][0]["usage"] == {"requests": 2, "prompt_tokens": 4, "completion_tokens": 6}
    assert len({draft.seed for draft in teacher.drafts}) == 2


def test_a_wrong_solution_keeps_its_wrong_answer_and_an_equal_spelling_of_an_answer_is_the_same_answer():
    done, _ = compressed([attempt(LONG, "7", "wrong")], [("brief", "7")])
    assert done["solutions"][0]["text"] == "brief"
    half, _ = compressed([attempt(LONG, "0.5", "wrong")], [("brief", "\\frac{1}{2}")], task=MathTask(num_workers=1))
    assert half["solutions"][0]["answer"] == "\\frac{1}{2}"


def test_what_cannot_be_shortened_is_kept_long_if_asked_for_and_else_may_empty_the_row():
    kept, _ = compressed([attempt(LONG)], [("x", "9")], CompressionOptions(11, 6, on_failure="keep"))
    assert kept["solutions"][0]["text"] == LONG and not kept.get("removed")
    dropped, _ = compressed([attempt(LONG)], [("x", "9")])
    assert dropped["removed"] == "no solution short enough"


def test_steps_are_paragraphs_numbered_lines_or_else_sentences():
    assert steps_of("a\n\n\nb\n 2. c\nStep 3: d") == ["a", "b", "2. c", "Step 3: d"]
    assert steps_of("It is 3.5 long. So? Yes!") == ["It is 3.5 long.", "So?", "Yes!"]
    assert TokenCounter().count("x + 1 = 23.") == 6


# ---------------------------------------------------------------- judging


def judged(verdicts, order=None, passes=2, texts=None) -> tuple[dict, ScriptedTeacher]:
    texts = texts or [f"solution {'x' * n}" for n in range(len(verdicts))]
    solutions = [attempt(text, verdict=verdict) for text, verdict in zip(texts, verdicts, strict=True)]
    teacher = ScriptedTeacher(order=order)
    [done] = rank([row(solutions=solutions)], teacher, JudgingOptions(passes), seed=0, width=1)
    return done, teacher


def tags_of(done: dict) -> list[str]:
    return [solution["tag"].strip("[]") for solution in done["solutions"]]


@pytest.mark.parametrize(
    "correct, ranking, tags",
    [
        ([False, True, True], [2, 1], ["fail", "success", "best"]),
        ([True, False], [0], ["best", "fail"]),
        ([False, False, False], [], ["best", "fail", "fail"]),  # as the puzzles do
        ([True, True], [1, 0], ["success", "best"]),
    ],
)
def test_exactly_one_thread_is_best_and_it_is_correct_if_any_is(correct, ranking, tags):
    assert assign_tags(correct, ranking) == [Tag(f"[[{tag}]]") for tag in tags]


@pytest.mark.parametrize("ranking", [[], [0], [0, 0], [0, 1, 2]])
def test_a_ranking_must_name_each_correct_thread_once(ranking):
    with pytest.raises(ValueError, match="exactly once"):
        assign_tags([True, True, False], ranking)


def test_the_judge_sees_correct_solutions_only_in_two_different_orders():
    done, teacher = judged(["correct", "wrong", "correct", "unparsable", "correct"])
    shown = [contest.texts for contest in teacher.contests]
    right = {done["solutions"][index]["text"] for index in (0, 2, 4)}
    assert len(shown) == 2 and shown[0] != shown[1] and all(set(texts) == right for texts in shown)
    assert tags_of(done) == ["best", "fail", "success", "fail", "success"]  # the shortest correct one


def test_a_judge_that_goes_by_the_text_agrees_with_itself_and_one_that_goes_by_place_does_not():
    by_text, _ = judged(["correct"] * 3, order=lambda texts: sorted(range(3), key=lambda k: -len(texts[k])))
    assert by_text["judging"]["rankings"] == [[2, 1, 0]] * 2 and tags_of(by_text) == ["success", "success", "best"]
    assert by_text["judging"]["disagree_on_best"] is False and by_text["judging"]["disagreement"] == 0
    by_place, _ = judged(["correct"] * 3, order=lambda texts: range(3))
    assert by_place["judging"]["disagree_on_best"] is True and by_place["judging"]["disagreement"] == 1


@pytest.mark.parametrize("order", [[0, 0], [0], [0, 1, 2], [], [1, 2]])
def test_an_unusable_ranking_is_recorded_and_the_shortest_correct_solution_is_best(order):
    done, _ = judged(["correct", "correct"], order=lambda texts: order, texts=["a longer one", "short"])
    assert len(done["judging"]["errors"]) == 2 and done["judging"]["rankings"] == []
    assert tags_of(done) == ["success", "best"]


def test_nothing_is_asked_where_there_is_nothing_to_compare():
    for verdicts in (["correct", "wrong"], ["wrong", "wrong"]):
        done, teacher = judged(verdicts)
        assert not teacher.contests and done["judging"]["disagreement"] is None


def test_orders_are_combined_by_mean_place():
    assert combined([[2, 0, 1], [2, 1, 0]], [9, 5, 9]) == [2, 1, 0]  # places 0, 3, 3: the shorter of the tied first
    assert combined([[0, 1, 2], [0, 2, 1], [1, 0, 2]], [9, 1, 1]) == [0, 1, 2]
    assert combined([], [3, 1, 2]) == [1, 2, 0]


def test_disagreement_is_the_share_of_swapped_pairs():
    assert disagreement([0, 1, 2], [0, 1, 2]) == 0 and disagreement([0, 1, 2], [2, 1, 0]) == 1
    assert disagreement([0, 1, 2], [1, 0, 2]) == pytest.approx(1 / 3)
    assert all(disagreement(a, b) == disagreement(b, a) for a in permutations(range(3)) for b in permutations(range(3)))


# ---------------------------------------------------------------- assembly


def assembled(verdicts, style="history", seed=0, **options) -> dict:
    done, _ = judged(verdicts)
    [out] = assemble([done | {"style": style}], AssemblyOptions(**options), "teacher", seed)
    return out


def mix(out: dict) -> str:
    return "".join(sorted(out["solutions"][index]["verdict"][0] for index in out["threads"]))


@pytest.mark.parametrize(
    "verdicts, options, expected",
    [
        ("cccw", dict(num_threads=3), "ccc"),
        ("cccw", dict(num_threads=3, min_failed=1), "ccw"),
        ("cccw", dict(num_threads=2, max_correct=1), "cw"),
        ("wwwc", dict(num_threads=3), "cww"),
        ("www", dict(num_threads=2, min_correct=0), "ww"),
        ("www", dict(num_threads=2), "too few correct"),
        ("ccc", dict(num_threads=2, min_failed=1), "too few failed"),
        ("cw", dict(num_threads=3), "too few threads"),
        ("ccc", dict(num_threads=2, max_correct=1), "too few threads"),
    ],
)
def test_the_mix_is_what_the_options_say_or_the_reason_why_not(verdicts, options, expected):
    names = {"c": "correct", "w": "wrong"}
    out = assembled([names[letter] for letter in verdicts], **options)
    assert (out.get("removed") or mix(out)) == expected
    if not out.get("removed"):
        tags = [thread.tag for thread in to_trace(out).threads]
        assert tags.count(Tag.BEST) == 1 and len(set(out["threads"])) == options["num_threads"]


def test_threads_stand_in_random_order_but_the_first_says_best_where_none_is_correct():
    places = {assembled(["correct", "wrong", "wrong"], seed=s, num_threads=3)["threads"].index(0) for s in range(20)}
    assert places == {0, 1, 2}
    for seed in range(5):
        out = assembled(["wrong"] * 3, seed=seed, num_threads=3, min_correct=0)
        assert [t.tag for t in to_trace(out).threads] == [Tag.BEST, Tag.FAIL, Tag.FAIL]


def test_debates_keep_all_threads_in_their_order():
    out = assembled(["wrong", "correct", "wrong"], style="debate", num_threads=3)
    assert out["threads"] == [0, 1, 2]
    assert assembled(["wrong", "correct"], style="debate", num_threads=3)["removed"] == "too few threads"


def test_answers_of_an_assembled_trace_start_in_one_column_of_the_lattice():
    from lace_lightning.puzzles.vocabulary import word_tokenizer
    from lace_lightning.traces.template import Segment

    trace = to_trace(assembled(["correct", "wrong", "wrong"], num_threads=3))
    words = {word for thread in trace.threads for word in thread.text.split()}
    tokenizer = word_tokenizer(["###", "Assessment", "\\boxed{5}", "2", "+", "3", *words, *map(str, Tag)])
    collate = TraceCollator(tokenizer, MathTask().template, num_threads=3, max_length=64)
    batch = collate([(collate.check(trace), 0)])
    tags = (batch.segments[0] == Segment.TAG).int().argmax(-1)
    assert len(set(tags.tolist())) == 1


@pytest.mark.parametrize("options", [dict(min_correct=3, max_correct=2), dict(min_correct=3, min_failed=2)])
def test_a_mix_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="assembly: min_correct=3"):
        AssemblyOptions(**options)
