"""Rewards on groups built by hand, and advantages worked out on paper."""

import pytest
import torch

from lace_lightning.embedding import NgramEmbedder
from lace_lightning.rewards import (
    AccuracyReward,
    DiversityReward,
    FormatReward,
    Reward,
    group_advantages,
    total_reward,
)
from lace_lightning.traces.tags import parse_tag
from tests.hand_built import BEST, FAIL, RIGHT, SUCCESS, UNPARSABLE, WRONG, group, tagged, thread


@pytest.mark.parametrize(
    ("assessments", "is_valid"),
    [
        (["1 [[best]]", "1 [[success]]", "2 [[fail]]"], True),
        (["1 [[best]]\n", "2 [[fail]]  "], True),
        (["[[best]]"], True),
        (["1 [[best]]", "1 [[best]]"], False),  # two winners
        (["1 [[success]]", "2 [[fail]]"], False),  # no winner
        (["1 [[best]]", "2"], False),  # a thread without tag
        (["1 [[best]]", "2 [[fail]] [[fail]]"], False),  # a thread with two
        (["1 [[best]] [[fail]]", "2 [[fail]]"], False),
        (["[[best]] 1", "2 [[fail]]"], False),  # the tag does not close the thread
        (["1 [[BEST]]", "2 [[fail]]"], False),
        (["1 [best]", "2 [[fail]]"], False),
        (["1 [[best]", "2 [[fail]]"], False),
        (["1 [[ best ]]", "2 [[fail]]"], False),
        (["1 [[best]].", "2 [[fail]]"], False),
        (["", ""], False),
        (["1 [[winner]]", "2 [[fail]]"], False),
    ],
)
def test_format_reward_follows_the_tags_as_written(assessments, is_valid):
    written = tagged(*[parse_tag(assessment) for assessment in assessments])
    reward = FormatReward()([written], [[WRONG] * len(assessments)])
    assert reward.tolist() == [float(is_valid)]


@pytest.mark.parametrize(
    ("tags", "verdicts", "expected"),
    [
        ((BEST, FAIL), (RIGHT, WRONG), 1),
        ((SUCCESS, BEST), (WRONG, RIGHT), 1),
        ((SUCCESS, BEST), (RIGHT, WRONG), 0),  # right, but not chosen
        ((BEST, FAIL), (UNPARSABLE, RIGHT), 0),
        ((BEST, BEST), (RIGHT, RIGHT), 0),  # right, but the tags are not valid
        ((BEST, None), (RIGHT, RIGHT), 0),
        ((SUCCESS, SUCCESS), (RIGHT, RIGHT), 0),
    ],
)
def test_accuracy_reward_is_for_the_chosen_thread_of_a_validly_tagged_group(tags, verdicts, expected):
    assert AccuracyReward()([tagged(*tags)], [verdicts]).tolist() == [expected]


def test_total_reward_is_the_weighted_sum_and_parts_come_without_weight():
    # Orthogonal thoughts: distance 1. Equal thoughts: 0.
    orthogonal = group([thread(tag=BEST, thought="a"), thread(tag=FAIL, thought="b")])
    equal = group([thread(tag=BEST, thought="a"), thread(tag=None, thought="a")])
    rewards = [AccuracyReward(), FormatReward(0.5), DiversityReward(NgramEmbedder(dim=4096), weight=0.25)]
    total, parts = total_reward(rewards, [orthogonal, equal], [(WRONG, RIGHT), (RIGHT, RIGHT)])
    assert {name: part.tolist() for name, part in parts.items()} == {
        "accuracy": [0, 0],
        "format": [1, 0],
        "diversity": pytest.approx([1, 0], abs=1e-6),
    }
    assert total.tolist() == pytest.approx([0.5 + 0.25, 0], abs=1e-6)
    assert {total.dtype, *(part.dtype for part in parts.values())} == {torch.float32}


def test_a_plug_in_reward_joins_the_sum():
    class TokenCost(Reward):
        def __call__(self, groups, verdicts):
            return torch.tensor([float(sum(item.num_tokens for item in group.threads)) for group in groups])

    groups = [group([thread(num_tokens=2), thread(num_tokens=3)])]
    total, parts = total_reward([TokenCost(-0.1, "cost")], groups, [[WRONG, WRONG]])
    assert parts["cost"].tolist() == [5] and total.tolist() == pytest.approx([-0.5])


def test_rewards_that_share_a_name_or_have_no_finite_weight_are_refused():
    with pytest.raises(ValueError, match="own name"):
        total_reward([FormatReward(), FormatReward(2.0)], [tagged(BEST)], [[RIGHT]])
    with pytest.raises(ValueError, match="weight=nan"):
        AccuracyReward(weight=float("nan"))


def test_a_verdict_row_too_few_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        AccuracyReward()([tagged(BEST), tagged(BEST)], [[RIGHT]])


def test_advantages_compare_groups_of_the_same_problem_only():
    # Means 0.5 and 0.75; the second problem's rewards do not touch the first's.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, -0.75, 0.25]])
    torch.testing.assert_close(group_advantages(rewards), expected)
    # Standard deviations sqrt(4 · 0.25 / 4) = 0.5 and sqrt((3 · 0.0625 + 0.5625) / 4) = sqrt(0.1875).
    scaled = torch.stack([expected[0] / 0.5, expected[1] / 0.1875**0.5])
    torch.testing.assert_close(group_advantages(rewards, scale="std"), scaled)


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("reward", [0.0, 1.1, 1e-3])
def test_tied_groups_have_no_advantage(scale, reward):
    noise = torch.tensor([0.0, 6e-8, -6e-8, 0.0])  # float32 rounding must not be blown up by the division
    advantages = group_advantages((reward + noise).reshape(1, 4), scale=scale)
    torch.testing.assert_close(advantages, torch.zeros(1, 4), atol=2e-7, rtol=0)
    assert group_advantages(torch.tensor([[reward]]), scale=scale).tolist() == [[0]]


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="scale='max'"):
        group_advantages(torch.zeros(1, 2), scale="max")
