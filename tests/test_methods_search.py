"""Tree of thoughts and pruning against brute force, and every method's independence of its batch."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from lace_lightning.decoding import group_seed
from lace_lightning.evaluation import methods
from lace_lightning.evaluation.methods import PrunedVote, TreeOfThoughts
from lace_lightning.evaluation.methods.choice import parse_headings
from lace_lightning.puzzles import Countdown
from lace_lightning.tasks import FollowUp
from lace_lightning.verification import MathTask
from tests.method_helpers import ScriptedPolicy, answer, problem, run

ASKED = "30 100 93 -> 23"
ALL = {
    "single": methods.SingleThread("p"),
    "together": methods.Together("p"),
    "together, drawn": methods.Together("p", select="mean"),
    "vote": methods.IndependentVote("p", 3),
    "claimed": methods.IndependentVote("p", 3, claimed=True),
    "oracle": methods.BestOfN("p", 3),
    "judge": methods.JudgeSelection("p", 3),
    "merge": methods.MergePaths("p", 3),
    "fork": methods.ForkJoin("p"),
    "refine": methods.SequentialRefinement("p", 3),
    "tree": TreeOfThoughts("p", breadth=2, samples=3, depth=3),
    "pruned": PrunedVote("p", 4, 2, window=2),
}


def random_reply(text: str, seed: int, thread: int) -> str:
    """Something that each kind of question may be answered with, a function of question, seed and thread."""
    rng = Random(f"{text} {seed} {thread}")
    value = rng.choice(["30 - 7", "7", "1", "2", "10", "5", ""])
    thought = " ".join(rng.choices(["branch", "ab+", "bc-", "hit", "7", "="], k=rng.randint(0, 5)))
    return rng.choice([f"{thought} ; {value} {rng.choice(['[[best]]', '[[fail]]', '[[success]]'])}", thought])


def random_logprobs(text: str) -> list[float]:
    return [-Random(f"{text} {k}").random() for k, _ in enumerate(text.split())]


@pytest.mark.parametrize("name", ALL)
def test_an_outcome_depends_on_problem_and_seed_not_on_the_batch(name):
    problems, seeds = [problem(k) for k in range(12)], [100 + k % 9 for k in range(12)]

    def solve(chosen):
        policy = ScriptedPolicy(random_reply, logprobs=random_logprobs)
        found = ALL[name].solve(policy, [problems[k] for k in chosen], [seeds[k] for k in chosen])
        return [(o.passages, o.chosen, o.confidence, o.notes, o.cost.tokens, o.cost.columns) for o in found]

    together = solve(range(12))
    assert together == solve(range(12))
    assert [together[k] for k in (11, 3, 5)] == solve((11, 3, 5))
    assert together[4] == solve([4])[0]
    assert len({str(outcome) for outcome in together}) > 1


@pytest.mark.parametrize("name", ALL)
def test_all_problems_of_a_batch_go_through_each_step_together(name):
    def rounds(count):
        policy = ScriptedPolicy(random_reply, logprobs=random_logprobs)
        ALL[name].solve(policy, [problem(k) for k in range(count)], [*range(count)])
        return len(policy.calls)

    assert rounds(40) <= max(6, rounds(1))


@pytest.mark.parametrize("name", ALL)
def test_cost_counts_every_token_and_confidence_is_a_share(name):
    for seed in range(20):
        policy = ScriptedPolicy(random_reply, logprobs=random_logprobs)
        outcome = run(ALL[name], policy, seed)
        assert outcome.cost.tokens == sum(passage.thread.num_tokens for passage in outcome.passages)
        distinct = [set(call.texts) for call in policy.calls]
        asked = sum(len(text.split()) for texts in distinct for text in texts)
        assert outcome.cost.prompt_tokens >= asked and outcome.cost.seconds == pytest.approx(len(policy.calls))
        assert outcome.confidence is None or 0 <= outcome.confidence <= 1
        assert outcome.chosen is None or outcome.passages[outcome.chosen].thread.answer


def tree_reply(text: str, seed: int, thread: int) -> str:
    """Steps are small numbers, the third gives an answer; a rating is a fixed function of the steps."""
    words = text.removeprefix(ASKED).split()
    steps = [word for word in words[1:] if word != ","]
    if words[0] == "rate":
        return f"; {rating(steps)} [[success]]"
    step = str(seed % 5)
    return f"{step} ; {'-'.join([*steps, step])} [[best]]" if len(steps) == 2 else f"{step} ; [[success]]"


def rating(steps):
    return Random(" ".join(steps)).choice(["0", "2", "2.5", "5", "10", "11", "nonsense"])


def as_number(text):
    return float(text) / 10 if text not in ("11", "nonsense") else 0.0


def beam_by_brute_force(seed, breadth, samples, depth):
    """Independently: states are tuples of words; the seeds are what the policy is documented to get."""
    beam = [()]
    for level in range(depth):
        seeds = [group_seed(seed, 2 * level, place) for place in range(len(beam) * samples)]
        proposed = [beam[place // samples] + (str(own % 5),) for place, own in enumerate(seeds)]
        new = [state for k, state in enumerate(proposed) if state not in proposed[:k]]
        order = sorted(range(len(new)), key=lambda k: (-as_number(rating(new[k])), k))
        beam = [new[k] for k in order[:breadth]]
    return beam


@pytest.mark.parametrize(("breadth", "samples"), [(1, 4), (2, 3), (4, 4), (8, 2)])
def test_the_beam_is_what_brute_force_keeps(breadth, samples):
    for seed in range(30):
        policy = ScriptedPolicy(tree_reply)
        outcome = run(TreeOfThoughts("p", breadth, samples, depth=8), policy, seed)
        best = beam_by_brute_force(seed, breadth, samples, 3)[0]
        assert answer(outcome) == "-".join(best)
        assert outcome.confidence == as_number(rating(best))
        assert len(policy.calls) == 6  # propose and rate at each of three levels; then all are finished


def test_a_tree_cut_before_any_answer_has_none_and_empty_steps_lead_nowhere():
    outcome = run(TreeOfThoughts("p", 2, 2, depth=2), ScriptedPolicy(tree_reply))
    assert outcome.chosen is None and {passage.role for passage in outcome.passages} == {"step", "rating"}
    silent = ScriptedPolicy(lambda text, seed, thread: "; [[success]]")
    assert run(TreeOfThoughts("p", 2, 2), silent).chosen is None and len(silent.calls) == 1


def test_a_finished_state_stays_in_the_beam_while_others_grow():
    def reply(text, seed, thread):
        steps = text.removeprefix(ASKED).split()
        if steps[0] == "rate":
            return f"; {9 if '7' in steps else 3} [[success]]"
        return "1 ; [[success]]" if seed % 2 else "7 ; 7 [[best]]"

    outcome = run(TreeOfThoughts("p", 2, 8, depth=3), ScriptedPolicy(reply))
    assert answer(outcome) == "7" and outcome.confidence == 0.9


def test_pruning_stops_where_a_window_first_falls_below_the_threshold():
    """Warm-up windows of 2: lowest means -0.5 and -1.0, of which keep=0.5 lets one through."""
    rows = iter([[-0.5] * 5, [-0.2, -1.0, -1.0], [-0.1] * 4, [-0.1, -0.1, -1.1, -0.1, -0.1], [-0.5, -0.5, -0.6]])
    replies = in_order = iter(
        ["a ; 1 [[best]]", "b ; 2 [[best]]", "c ; 3 [[best]]", "d ; 3 [[best]]", "e ; 3 [[best]]"]
    )
    policy = ScriptedPolicy(lambda text, seed, thread: next(replies), logprobs=lambda text: next(rows))
    outcome = run(PrunedVote("p", num_threads=5, warmup=2, keep=0.5, window=2), policy)
    assert [p.thread.num_tokens for p in outcome.passages] == [5, 3, 4, 3, 3]
    assert [p.role for p in outcome.passages] == ["path", "path", "path", "pruned", "pruned"]
    assert outcome.passages[3].thread.answer is None and outcome.passages[3].thread.logprobs == (-0.1, -0.1, -1.1)
    assert (outcome.cost.tokens, outcome.cost.columns) == (18, 5 + 4)
    assert outcome.notes == {"stopped": 2, "saved": pytest.approx(2 / 20)}
    assert answer(outcome) == "3"  # weights e^-0.5, e^-1.0 and e^-0.1
    weights = [math.exp(x) for x in (-0.5, -1.0, -0.1)]
    assert outcome.confidence == pytest.approx(weights[2] / sum(weights))
    assert next(in_order, None) is None


@pytest.mark.parametrize("seed", range(10))
def test_a_stopped_thread_is_the_beginning_of_the_whole_one(seed):
    policy = ScriptedPolicy(random_reply, logprobs=random_logprobs)
    pruned = run(PrunedVote("p", 8, 4, keep=0.25, window=2), policy, seed)
    whole = run(methods.IndependentVote("p", 8), ScriptedPolicy(random_reply, logprobs=random_logprobs), seed)
    for ours, theirs in zip(pruned.passages, whole.passages, strict=True):
        end = ours.thread.num_tokens
        assert ours.thread.logprobs == theirs.thread.logprobs[:end]
        assert (ours.role == "pruned") or ours.thread == theirs.thread


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TreeOfThoughts("p", 0), "breadth=0"),
        (lambda: TreeOfThoughts("p", samples=0), "samples=0"),
        (lambda: TreeOfThoughts("p", depth=0), "depth=0"),
        (lambda: PrunedVote("p", 4, 4), "warmup=4"),
        (lambda: PrunedVote("p", 4, 0), "warmup=0"),
        (lambda: PrunedVote("p", 4, 2, keep=0.0), "keep=0.0"),
        (lambda: PrunedVote("p", 4, 2, window=0), "window=0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_mathematics_words_every_question_and_takes_braces_of_models_as_text():
    task = MathTask()
    texts = {FollowUp.FORK: [], FollowUp.STEP: [], FollowUp.BRANCH: ["{x} induction"]}
    for kind in FollowUp:
        given = texts.get(kind, [r"\frac{1}{2}", "{problem} {texts}"])
        worded = task.follow_up(kind, problem(), given)
        assert worded.startswith(ASKED) and all(text in worded for text in given)
        assert r"\boxed{…}" in worded or kind is FollowUp.FORK
    assert "[2] {problem} {texts}" in task.follow_up(
        FollowUp.JUDGE, problem(), texts.get(FollowUp.JUDGE, ["a", "{problem} {texts}"])
    )
    assert "(none)" in task.follow_up(FollowUp.STEP, problem(), [])
    with pytest.raises(ValueError, match="follow_ups='v0'.*v1"):
        MathTask(follow_ups="v0")


def test_headings_are_read_from_lines_and_from_words():
    thread = ScriptedPolicy(lambda *asked: "")._thread
    assert parse_headings(thread("branch ab+ branch bc- ; [[success]]")) == ["ab+", "bc-"]
    assert parse_headings(thread("I see.\nBranch: parity of n\nbranch: brute force\nBRANCH:\n")) == [
        "parity of n",
        "brute force",
    ]
    assert parse_headings(thread("branches everywhere, rebranch ab+")) == []


def test_countdown_prompts_stay_short_whatever_a_model_wrote():
    puzzle, tokenizer = Countdown(tries=1), Countdown(tries=1).tokenizer()
    for kind, long in itertools.product(FollowUp, ["9 " * 500, "hit ; " * 99, "branch", "\x00 :"]):
        text = puzzle.follow_up(kind, problem(), [long] * 4)
        assert len(puzzle.template.encode_prompt(text, tokenizer)) <= 7 + 1 + 4 * (1 + 14) + 3
