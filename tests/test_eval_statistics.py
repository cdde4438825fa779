"""Numbers of outcomes, differences at equal cost, shared errors and calibration, against hand work and other code."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lace_lightning.embedding import NgramEmbedder
from lace_lightning.evaluation.calibration import calibrate
from lace_lightning.evaluation.comparison import at_equal_cost, difference, family_of
from lace_lightning.evaluation.correlation import apart, shared_errors, together
from lace_lightning.evaluation.statistics import (
    STATISTICS,
    Sample,
    mean_estimate,
    resampled,
    samples_of,
    with_statistics,
)
from lace_lightning.tasks import Verdict
from tests.eval_helpers import judged

RIGHT, WRONG, UNREADABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSABLE


def numbers(*outcomes):
    return [one.statistics for one in with_statistics(outcomes, NgramEmbedder())]


# ---------------------------------------------------------------- single outcomes


def test_statistics_of_an_outcome_are_those_worked_out_by_hand():
    (found,) = numbers(judged([("8", WRONG), ("7", RIGHT), ("8", WRONG), (None, UNREADABLE)], chosen=1))
    # fmt: first thread [[best]], others [[fail]]; all thoughts are equal; the vote goes to 8
    assert found == {
        "acc": 1.0, "best_at_n": 1.0, "mean_at_n": 0.25, "vote_at_n": 0.0, "expl": pytest.approx(0, abs=1e-6),
        "edit_distance": 0.0, "fmt": 1.0, "unparsable": 0.25, "tokens": 12.0, "prompt_tokens": 5.0, "columns": 4.0,
        "seconds": 0.5,
    }  # fmt: skip
    assert set(found) == set(STATISTICS)


def test_a_method_without_a_choice_is_wrong_and_paths_of_several_groups_have_no_tags_to_agree_on():
    no_choice, apart_ = numbers(
        judged([("7", RIGHT)], chosen=None), judged([("7", RIGHT), ("7", RIGHT)], same_group=False)
    )
    assert no_choice["acc"] == 0 and no_choice["best_at_n"] == 1
    assert apart_["acc"] == 1 and "fmt" not in apart_ and "fmt" in no_choice


def test_what_was_found_is_told_from_what_was_chosen():
    paths = [("8", WRONG), ("7", RIGHT)]
    assert [judged(paths, chosen).found for chosen in (1, 0, None)] == [
        "chosen right", "found but not chosen", "found but not chosen",
    ]  # fmt: skip
    assert judged([("8", WRONG)]).found == "not found"


def test_seeds_are_averaged_inside_of_problems_before_problems_are():
    outcomes = [judged([("7", RIGHT)], number=0, seed=seed) for seed in range(3)]
    outcomes += [judged([("8", WRONG)], number=1)]
    keyed = [(one.key, one.statistics) for one in with_statistics(outcomes, NgramEmbedder())]
    sample = samples_of(keyed)["toy", "lace"]
    assert sample.values["acc"].tolist() == [1.0, 0.0] and sample.num_outcomes == 4  # 0.5, not 0.75
    assert mean_estimate(sample.values["acc"]).value == 0.5


# ---------------------------------------------------------------- the bootstrap


def test_intervals_are_those_of_all_possible_resamples():
    """With 4 problems there are 4^4 samples: enumerate them."""
    values = np.array([0.0, 1.0, 1.0, 0.25])
    exact = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(exact, [0.025, 0.975])
    found = mean_estimate(values, resamples=40_000)
    assert found.value == 0.5625
    assert found.low == pytest.approx(low, abs=0.07) and found.high == pytest.approx(high, abs=0.07)
    means = resampled(4, 40_000, 0) @ values / 4
    assert np.std(means) == pytest.approx(np.std(exact), rel=0.02) and means.mean() == pytest.approx(0.5625, abs=0.005)


def sample_of(acc, tokens, problems=None):
    problems = problems or [f"p{i}" for i in range(len(acc))]
    values = {name: np.full(len(acc), np.nan) for name in STATISTICS}
    values |= {"acc": np.array(acc, float), "tokens": np.array(tokens, float), "seconds": np.array(tokens, float) / 10}
    return Sample(tuple(problems), values, len(acc))


def test_paired_differences_are_those_of_brute_force_over_common_problems():
    ours = sample_of([1, 1, 0, 1], [10] * 4)
    theirs = sample_of([9, 0, 1, 1], [10] * 4, ["other", "p0", "p1", "p2"])  # p3 is missing there
    found = difference(ours, "theirs", theirs, resamples=40_000)
    gaps = [1 - 0, 1 - 1, 0 - 1]
    exact = 1000 * [np.mean(draw) for draw in itertools.product(gaps, repeat=3)]
    assert found.num_problems == 3 and found.difference.value == pytest.approx(0)
    low, high = np.quantile(exact, [0.025, 0.975])
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high))


def test_pairing_takes_the_problems_own_difficulty_out_of_the_interval():
    hard_and_easy = [i % 2 for i in range(40)]
    found = difference(sample_of(hard_and_easy, [1] * 40), "same", sample_of(hard_and_easy, [1] * 40))
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)


# ---------------------------------------------------------------- equal cost


def test_accuracy_at_equal_tokens_is_read_off_the_line_between_two_budgets():
    ours = sample_of([1, 1, 1, 0], [30] * 4)
    points = [sample_of([1, 1, 0, 0], [50] * 4), sample_of([1, 0, 0, 0], [10] * 4)]  # in any order
    found = at_equal_cost(ours, "vote", points, "tokens")
    assert found.how == "interpolated" and found.difference.value == pytest.approx(0.75 - (0.25 + 0.5) / 2)
    assert found.ratio == pytest.approx(50 / 30) or found.ratio == pytest.approx(10 / 30)


def test_intervals_at_equal_cost_are_those_of_a_loop_over_resamples():
    random_ = np.random.default_rng(0)
    ours = sample_of(random_.integers(0, 2, 12), random_.uniform(25, 35, 12))
    points = [sample_of(random_.integers(0, 2, 12), random_.uniform(n, 2 * n, 12)) for n in (5, 20, 50)]
    found = at_equal_cost(ours, "vote", points, "tokens", resamples=500, seed=3)
    draws = []
    for counts in resampled(12, 500, 3).astype(int):
        rows = np.repeat(np.arange(12), counts)
        line = sorted((p.values["tokens"][rows].mean(), p.values["acc"][rows].mean()) for p in points)
        read = np.interp(ours.values["tokens"][rows].mean(), *zip(*line, strict=True))
        draws.append(ours.values["acc"][rows].mean() - read)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


@pytest.mark.parametrize(
    ("costs", "how"),
    [
        ([10, 20], "too cheap"),
        ([40, 50], "too dear"),
        ([30.3], "same cost"),
        ([10, 29.8], "same cost"),
        ([20], "too cheap"),
    ],
)
def test_nothing_is_extrapolated(costs, how):
    ours = sample_of([1, 0], [30, 30])
    found = at_equal_cost(ours, "vote", [sample_of([0, 0], [cost] * 2) for cost in costs], "tokens")
    assert found.how == how
    assert math.isnan(found.difference.value) == (how != "same cost")
    if how == "same cost":
        assert found.difference.value == 0.5


def test_the_family_of_a_method_is_its_name_without_the_budget():
    assert [family_of(name) for name in ("vote@4", "vote", "a@b@2")] == ["vote", "vote", "a@b"]


# ---------------------------------------------------------------- shared errors


def draw_problem(rng, num_threads, num_seeds):
    answers = [("7", RIGHT), ("8", WRONG), ("9", WRONG), ("", UNREADABLE)]
    return [tuple(rng.choices(answers, [3, 3, 1, 1], k=num_threads)) for _ in range(num_seeds)]


def test_together_and_apart_are_those_of_enumeration():
    rng = random.Random(0)
    outcomes = draw_problem(rng, 4, 5)

    def same_wrong(paths):
        return len(set(paths)) == 1 and paths[0][1] == WRONG

    for k in (2, 3):
        inside = [same_wrong(subset) for subset in itertools.combinations(outcomes[0], k)]
        assert together(outcomes[0], k) == pytest.approx(np.mean(inside))
        across = [
            same_wrong(paths) for seeds in itertools.combinations(outcomes, k) for paths in itertools.product(*seeds)
        ]
        assert apart(outcomes, k) == pytest.approx(np.mean(across))


def test_independent_threads_have_no_excess_and_copies_have():
    rng = random.Random(1)
    independent = [draw_problem(rng, 4, 3) for _ in range(300)]
    found = shared_errors(independent)
    assert found.num_threads == 3 and found.num_problems == 300
    assert found.excess.low < 0 < found.excess.high
    p = 3 / 8
    assert found.together.value == pytest.approx(p**3 + (1 / 8) ** 3, abs=0.02)
    copies = [[(paths[0],) * 4 for paths in outcomes] for outcomes in independent]
    assert shared_errors(copies).excess.low > 0.2
    assert shared_errors(copies).all_same_wrong.value == pytest.approx(0.5, abs=0.07)


def test_one_seed_says_nothing_about_independence():
    found = shared_errors([[(("8", WRONG), ("8", WRONG))], [(("7", RIGHT), ("8", WRONG))]])
    assert found.all_wrong.value == 0.5 and found.all_same_wrong.value == 0.5
    assert math.isnan(found.apart.value) and found.num_problems == 0
    assert shared_errors([[(("8", WRONG),)]]) is None


# ---------------------------------------------------------------- calibration


def test_calibration_equals_that_of_other_code_and_of_hand_work():
    rng = random.Random(2)
    scores = [rng.random() for _ in range(200)]
    right = [rng.random() < score**2 for score in scores]
    found = calibrate(scores, right)
    theirs = binary_calibration_error(torch.tensor(scores), torch.tensor(right).long(), n_bins=10, norm="l1")
    assert found.ece == pytest.approx(float(theirs), abs=1e-5)
    pairs = [
        (a, b) for a, r in zip(scores, right, strict=True) for b, s in zip(scores, right, strict=True) if r and not s
    ]
    assert found.auroc == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]), abs=1e-6)
    bins = Counter(min(9, math.ceil(score * 10) - 1) for score in scores)
    assert {round(part.low * 10): part.num_outcomes for part in found.bins} == dict(bins)


def test_calibration_of_ties_and_of_nothing():
    tied = calibrate([0.5, 0.5, 0.5, 0.5], [True, False, True, False])
    assert tied.ece == 0 and tied.auroc == 0.5
    assert math.isnan(calibrate([0.2, 0.9], [True, True]).auroc) and calibrate([], []) is None
    with pytest.raises(ValueError, match=r"1\.5: must lie between 0 and 1"):
        calibrate([1.5], [True])
