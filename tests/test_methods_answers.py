"""What each method asks, which answer it takes and what it says that it cost."""

from __future__ import annotations

import math

import pytest

from lace_lightning.evaluation.method import Cost
from lace_lightning.evaluation.methods import (
    BestOfN,
    ForkJoin,
    IndependentVote,
    JudgeSelection,
    MergePaths,
    SequentialRefinement,
    SingleThread,
    Together,
)
from tests.method_helpers import LOGPROB, ScriptedPolicy, answer, in_turn, problem, run

ASKED = "30 100 93 -> 23"
WRONG = "ab+ ab+ 30 + 100 = 130 , 130 - 93 = 37 miss ; ( 30 + 100 ) - 93 [[fail]]"
RIGHT = "bc- bc- 100 - 93 = 7 , 30 - 7 = 23 hit ; 30 - ( 100 - 93 ) [[best]]"
OTHER = "ac+ ac+ 30 + 93 = 123 , 123 - 100 = 23 hit ; ( 30 + 93 ) - 100 [[success]]"
RIGHT_ANSWER, WRONG_ANSWER, OTHER_ANSWER = "30 - ( 100 - 93 )", "( 30 + 100 ) - 93", "( 30 + 93 ) - 100"
MUTE = "ab+ ab+ 30"
LENGTH = len(WRONG.split())
"""Words of each of the three solutions: 14 of thought, ; and 7 and a tag."""


def shown(*threads):
    return [thread.split(" ;")[0] for thread in threads]


def test_single_thread_takes_what_one_thread_says():
    policy = ScriptedPolicy(in_turn(WRONG))
    outcome = run(SingleThread("p"), policy)
    assert [(call.texts, call.num_threads) for call in policy.calls] == [([ASKED], 1)]
    assert answer(outcome) == WRONG_ANSWER and outcome.cost == Cost(5, LENGTH, LENGTH, 1.0)
    assert outcome.confidence == pytest.approx(math.exp(LOGPROB))
    assert answer(run(SingleThread("p"), ScriptedPolicy(in_turn(MUTE)))) is None


def test_threads_together_answer_with_the_one_that_says_best_and_with_nothing_if_tags_are_invalid():
    policy = ScriptedPolicy(in_turn(WRONG, WRONG, RIGHT, OTHER))
    outcome = run(Together("p"), policy)
    (call,) = policy.calls
    assert (call.texts, call.seeds, call.num_threads) == ([ASKED], [7], None)
    assert outcome.chosen == 2 and {passage.group for passage in outcome.passages} == {0}
    assert outcome.cost == Cost(5, 4 * LENGTH, LENGTH, 1.0) and outcome.notes == {"valid_tags": True}
    for lines in ([RIGHT, RIGHT, WRONG, WRONG], [WRONG] * 4, [RIGHT, WRONG, WRONG, MUTE]):
        outcome = run(Together("p"), ScriptedPolicy(in_turn(*lines)))
        assert outcome.chosen is None and outcome.confidence is None and outcome.notes == {"valid_tags": False}


def test_threads_together_may_vote_or_be_drawn_instead():
    lines = [RIGHT, WRONG, OTHER, WRONG]
    voted = run(Together("p", 4, select="vote"), ScriptedPolicy(in_turn(*lines)))
    assert voted.chosen == 1 and voted.confidence == 0.5
    drawn = [
        run(Together("p", 4, select="mean"), ScriptedPolicy(in_turn(*lines)), seed=seed).chosen for seed in range(400)
    ]
    assert all(70 <= drawn.count(thread) <= 130 for thread in range(4))


def test_independent_threads_vote_each_with_a_seed_of_its_own_and_the_prompt_paid_once():
    policy = ScriptedPolicy(in_turn(RIGHT, WRONG, WRONG, MUTE))
    outcome = run(IndependentVote("p", 4), policy)
    (call,) = policy.calls
    assert call.texts == [ASKED] * 4 and call.num_threads == 1 and len(set(call.seeds)) == 4
    assert answer(outcome) == WRONG_ANSWER and outcome.chosen == 1 and outcome.confidence == 0.5
    assert outcome.cost == Cost(5, 3 * LENGTH + 3, LENGTH, 1.0)
    assert [passage.group for passage in outcome.passages] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "claimed", "chosen"),
    [
        ([WRONG, RIGHT, RIGHT, WRONG], False, 0),
        ([RIGHT, WRONG, WRONG, RIGHT], False, 0),
        ([OTHER, RIGHT, WRONG, MUTE], False, 0),
        ([WRONG, WRONG, RIGHT, OTHER], True, 2),
        ([MUTE, WRONG, WRONG, OTHER], True, 3),
        ([MUTE, WRONG, RIGHT.replace("best", "fail"), WRONG], True, 1),
        ([MUTE] * 4, True, None),
        ([MUTE] * 4, False, None),
    ],
)
def test_ties_go_to_the_first_and_claims_come_before_numbers_if_asked_so(lines, claimed, chosen):
    assert run(IndependentVote("p", 4, claimed), ScriptedPolicy(in_turn(*lines))).chosen == chosen


def test_best_of_n_knows_the_truth_and_says_so():
    outcome = run(BestOfN("p", 4), ScriptedPolicy(in_turn(WRONG, MUTE, RIGHT, OTHER)))
    assert outcome.chosen == 2 and outcome.notes == {"oracle": True}
    assert run(BestOfN("p", 2), ScriptedPolicy(in_turn(WRONG, WRONG))).chosen == 0


def test_a_judge_reads_the_threads_that_answer_and_its_number_counts_among_those():
    policy = ScriptedPolicy(in_turn(MUTE, WRONG, RIGHT, WRONG, "miss hit miss ; 2 [[best]]"))
    outcome = run(JudgeSelection("p", 4), policy)
    a, b, c = shown(WRONG, RIGHT, WRONG)
    assert policy.calls[1].texts == [f"{ASKED} judge 1 {a} , 2 {b} , 3 {c}"]
    assert outcome.chosen == 2 and outcome.passages[-1].role == "judge"
    question = len(policy.calls[1].texts[0].split())
    assert outcome.cost == Cost(5 + question, 3 * LENGTH + 3 + 6, LENGTH + 6, 2.0)


@pytest.mark.parametrize("number", ["0", "5", "-1", "1 2", "٢", "", "30 - ( 100 - 93 )", "9" * 5000])
def test_a_judge_that_names_no_candidate_leaves_it_to_the_vote(number):
    reply = f"miss ; {number} [[best]]"
    outcome = run(JudgeSelection("p", 4), ScriptedPolicy(in_turn(RIGHT, WRONG, WRONG, OTHER, reply)))
    assert outcome.chosen == 1 and outcome.confidence == 0.5 and outcome.notes == {"fallback": True}


def test_no_judge_is_asked_where_there_is_nothing_to_choose():
    for lines, chosen in (([MUTE, RIGHT], 1), ([MUTE, MUTE], None)):
        policy = ScriptedPolicy(in_turn(*lines))
        assert run(JudgeSelection("p", 2), policy).chosen == chosen and len(policy.calls) == 1


def test_refinement_shows_all_earlier_attempts_and_stops_at_a_claim():
    policy = ScriptedPolicy(in_turn(WRONG, MUTE, RIGHT, WRONG))
    outcome = run(SequentialRefinement("p", rounds=4), policy)
    first, second = shown(WRONG)[0], MUTE
    assert [call.texts for call in policy.calls] == [
        [ASKED], [f"{ASKED} refine {first}"], [f"{ASKED} refine {first} , {second}"]
    ]  # fmt: skip
    assert outcome.chosen == 2 and [passage.role for passage in outcome.passages] == ["path", "revision", "revision"]
    prompts = sum(len(call.texts[0].split()) for call in policy.calls)
    assert outcome.cost == Cost(prompts, 2 * LENGTH + 3, 2 * LENGTH + 3, 3.0)


def test_refinement_without_stopping_takes_the_last_answer():
    policy = ScriptedPolicy(in_turn(RIGHT, WRONG, MUTE))
    outcome = run(SequentialRefinement("p", rounds=3, stop=False), policy)
    assert len(policy.calls) == 3 and outcome.chosen == 1


def test_merging_reads_every_path_and_answers_itself():
    policy = ScriptedPolicy(in_turn(WRONG, MUTE, RIGHT, OTHER))
    outcome = run(MergePaths("p", 3), policy)
    first, third = shown(WRONG, RIGHT)
    assert policy.calls[1].texts == [f"{ASKED} merge {first} , {MUTE} , {third}"]
    assert outcome.chosen == 3 and answer(outcome) == OTHER_ANSWER and outcome.notes == {"fallback": False}
    fallen = run(MergePaths("p", 3), ScriptedPolicy(in_turn(MUTE, RIGHT, RIGHT, MUTE)))
    assert fallen.chosen == 1 and fallen.notes == {"fallback": True}


def test_a_fork_opens_the_branches_that_the_model_names_and_joins_them():
    policy = ScriptedPolicy(
        in_turn("branch ab+ branch bc- branch ab+ branch ac* branch ; [[success]]", WRONG, RIGHT, OTHER)
    )
    outcome = run(ForkJoin("p", max_branches=2), policy)
    first, second = shown(WRONG, RIGHT)
    assert [call.texts for call in policy.calls] == [
        [f"{ASKED} fork"], [f"{ASKED} branch ab+", f"{ASKED} branch bc-"], [f"{ASKED} merge {first} , {second}"]
    ]  # fmt: skip
    assert answer(outcome) == OTHER_ANSWER
    assert [passage.role for passage in outcome.passages] == ["plan", "path", "path", "merge"]
    assert outcome.cost.columns == 11 + 2 * LENGTH and outcome.cost.tokens == 11 + 3 * LENGTH


def test_a_plan_without_branches_stands_for_itself_and_one_branch_is_not_joined():
    alone = ScriptedPolicy(in_turn(RIGHT))
    assert run(ForkJoin("p"), alone).chosen == 0 and len(alone.calls) == 1
    single = ScriptedPolicy(in_turn("branch bc- ; [[success]]", RIGHT))
    assert run(ForkJoin("p"), single).chosen == 1 and len(single.calls) == 2
    assert run(ForkJoin("p"), ScriptedPolicy(in_turn("; [[success]]"))).chosen is None


def test_methods_of_independent_threads_begin_with_the_same_threads():
    seeds = []
    for method in (SingleThread("p"), IndependentVote("p", 3), JudgeSelection("p", 3), MergePaths("p", 3)):
        policy = ScriptedPolicy(lambda text, seed, thread: RIGHT)
        run(method, policy)
        seeds.append(policy.calls[0].seeds)
    assert all(own == seeds[1][: len(own)] for own in seeds)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Together("p", 0), "num_threads=0"),
        (lambda: Together("p", select="best"), "select='best'"),
        (lambda: IndependentVote("p", 0), "num_threads=0"),
        (lambda: BestOfN("p", 0), "num_threads=0"),
        (lambda: JudgeSelection("p", 0), "num_threads=0"),
        (lambda: MergePaths("p", 0), "num_threads=0"),
        (lambda: ForkJoin("p", 0), "max_branches=0"),
        (lambda: SequentialRefinement("p", 0), "rounds=0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_outcomes_come_in_the_order_of_the_problems():
    policy = ScriptedPolicy(lambda text, seed, thread: RIGHT)
    for method in (SingleThread("p"), Together("p"), ForkJoin("p"), SequentialRefinement("p")):
        outcomes = method.solve(policy, [problem(2), problem(0)], [1, 2])
        assert [outcome.problem.id for outcome in outcomes] == ["p2", "p0"]
