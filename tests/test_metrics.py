"""Group metrics and tag counts on groups worked out by hand, their intervals, and their sum over processes."""

import re
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lace_lightning.embedding import NgramEmbedder
from lace_lightning.lattice import Reading
from lace_lightning.metrics import DESCRIPTIONS, GroupMetrics, TagConfusion
from lace_lightning.metrics.groups import is_majority_correct
from tests.hand_built import BEST, FAIL, RIGHT, SUCCESS, UNPARSABLE, WRONG, group, tagged, thread
from tests.test_readings import CROSS, GATE, SEGMENTS, SHARE, metrics_of, reading

# Valid tags; the chosen thread is right. Answers 1, 2, 2, 1: a tie that "1", first, wins. Thoughts a, b, a, a: three of
# six pairs differ, and differ wholly. Two threads are right, all readable, 2 + 1 + 1 + 1 tokens.
FIRST = group(
    [
        thread("1", BEST, "a", num_tokens=2),
        thread("2", FAIL, "b"),
        thread("2 ", FAIL, "a"),
        thread("1", SUCCESS, "a"),
    ]
)
FIRST_VERDICTS = [RIGHT, WRONG, WRONG, RIGHT]

# Two threads say [[best]]: not valid. The one answer that was given twice is wrong. Thoughts "cat" and "cut" differ in
# 1 of 3 letters; the two silent threads are far from nobody. One thread is right, one unreadable.
SECOND = group(
    [
        thread("1", BEST, "cat", num_tokens=3),
        thread("3", BEST, "cut", num_tokens=4),
        thread("3", FAIL, ""),
        thread(None, FAIL, ""),
    ]
)
SECOND_VERDICTS = [RIGHT, WRONG, WRONG, UNPARSABLE]

# Valid tags, and the chosen thread is wrong; nothing is right. All thoughts are equal.
THIRD = group([thread("7", BEST, "a b"), thread(None, FAIL, "a b"), thread("8", FAIL, "a b"), thread("9", FAIL, "a b")])
THIRD_VERDICTS = [WRONG, UNPARSABLE, WRONG, WRONG]

GROUPS = [FIRST, SECOND, THIRD]
VERDICTS = [FIRST_VERDICTS, SECOND_VERDICTS, THIRD_VERDICTS]
EXPECTED = {
    "acc": 1 / 3,
    "best_at_n": 2 / 3,
    "mean_at_n": (2 / 4 + 1 / 4 + 0) / 3,
    "vote_at_n": 1 / 3,
    "expl": (3 / 6 + 1 / 6 + 0) / 3,
    "edit_distance": (3 / 6 + (1 / 3) / 6 + 0) / 3,
    "fmt": 2 / 3,
    "unparsable": (0 + 1 / 4 + 1 / 4) / 3,
    "tokens": (5 + 9 + 4) / 3,
}


def group_metrics():
    return GroupMetrics(NgramEmbedder(dim=4096))


def test_group_metrics_are_those_worked_out_by_hand():
    metrics = group_metrics()
    metrics.update(GROUPS, VERDICTS)
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(EXPECTED, abs=1e-6)


def test_updates_of_different_sizes_and_reset_do_not_change_the_means():
    metrics = group_metrics()
    metrics.update([THIRD] * 5, [THIRD_VERDICTS] * 5)
    metrics.reset()
    metrics.update(GROUPS[:1], VERDICTS[:1])
    metrics.update([], [])
    metrics.update(GROUPS[1:], VERDICTS[1:])
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize(
    ("answers", "verdicts", "expected"),
    [
        (["1", "2", "2"], [RIGHT, WRONG, WRONG], False),
        (["2", "1", "1"], [WRONG, RIGHT, RIGHT], True),
        (["2", "1"], [WRONG, RIGHT], False),  # a tie: the first answer
        (["1", "2"], [RIGHT, WRONG], True),
        ([None, None, "1"], [UNPARSABLE, UNPARSABLE, RIGHT], True),  # None does not vote
        (["", " ", "1"], [UNPARSABLE, UNPARSABLE, RIGHT], True),
        (["1", " 1 ", "2", "2"], [RIGHT, RIGHT, WRONG, WRONG], True),  # outer space does not count
        (["5", "3", "3"], [WRONG, WRONG, RIGHT], True),  # doors: only one of the threads tried the door itself
        ([None], [UNPARSABLE], False),
    ],
)
def test_the_vote_goes_to_the_most_frequent_answer(answers, verdicts, expected):
    assert is_majority_correct(group([thread(answer) for answer in answers]), verdicts) is expected


def test_groups_of_one_thread_explore_nothing_and_agree_with_themselves():
    metrics = group_metrics()
    metrics.update([group([thread("1", BEST)])], [[RIGHT]])
    values = metrics.compute()
    assert values["expl"] == values["edit_distance"] == 0
    assert values["acc"] == values["best_at_n"] == values["mean_at_n"] == values["vote_at_n"] == 1


@pytest.mark.parametrize("verdicts", [[[RIGHT]], [FIRST_VERDICTS, FIRST_VERDICTS], [[*FIRST_VERDICTS, RIGHT]]])
@pytest.mark.parametrize("metric", [group_metrics(), TagConfusion()])
def test_verdicts_that_do_not_fit_the_threads_are_refused(metric, verdicts):
    with pytest.raises(ValueError):
        metric.update([FIRST], verdicts)


def test_intervals_are_those_of_the_binomial_law():
    # acc over 400 groups with 100 right: the bootstrap mean is Binomial(400, 1/4)/400, sd 0.02165, so the central 95 %
    # lie within 1.96 sd, up to the grid of 1/400 and the noise of 2,000 resamples.
    metrics = group_metrics()
    right, wrong = tagged(BEST), tagged(BEST)
    metrics.update([right] * 100 + [wrong] * 300, [[RIGHT]] * 100 + [[WRONG]] * 300)
    intervals = metrics.intervals()
    assert list(intervals) == list(EXPECTED)
    assert intervals["acc"] == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.004)
    assert intervals["fmt"] == (1.0, 1.0)
    narrow = metrics.intervals(level=0.5)["acc"]
    assert narrow == pytest.approx((0.25 - 0.674 * 0.02165, 0.25 + 0.674 * 0.02165), abs=0.004)


def test_intervals_repeat_with_their_seed_and_leave_global_randomness_alone():
    metrics = group_metrics()
    metrics.update(GROUPS * 10, VERDICTS * 10)
    torch.manual_seed(1)
    first = metrics.intervals(seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    assert metrics.intervals(seed=3) == first != metrics.intervals(seed=4)
    with pytest.raises(ValueError, match="level=95"):
        metrics.intervals(level=95)


def test_metrics_without_groups_are_nan():
    metrics = group_metrics()
    metrics.update([], [])
    assert all(value.isnan() for value in metrics.compute().values())
    assert all(low != low and high != high for low, high in metrics.intervals().values())


def test_tag_confusion_counts_verdicts_by_tag():
    confusion = TagConfusion()
    confusion.update(
        [tagged(BEST, FAIL, FAIL, None), tagged(BEST, SUCCESS, FAIL, FAIL)],
        [[RIGHT, WRONG, UNPARSABLE, RIGHT], [WRONG, RIGHT, RIGHT, WRONG]],
    )
    values = confusion.compute()
    assert values["confusion"].tolist() == [
        # best, success, fail, none
        [1, 1, 1, 1],  # correct
        [1, 0, 2, 0],  # wrong
        [0, 0, 1, 0],  # unparsable
    ]
    assert values["one_tag"] == 7 / 8
    assert values["fmt"] == 1 / 2


# Ragged on purpose: the ranks hold 3 and 1 groups in the first case and 4 and none in the second.
SHARES = [([0, 1, 2], [1]), ([0, 1, 2, 1], [])]


def read_group(index: int) -> tuple[list[Reading], torch.Tensor]:
    """Two layers' readings of a group; groups differ in gates, shares and lengths."""
    segments = SEGMENTS.clone()
    segments[..., 4 - index :] = 0
    share = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]) if index else SHARE  # a thread that reads nothing has no share
    layers = ((3, GATE / (index + 1), CROSS), (5, GATE / 2, CROSS / (index + 2)))
    return [reading(layer, gate, cross, share) for layer, gate, cross in layers], segments


def _measure_on_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = []
    for shares in SHARES:
        metrics, confusion, readings = group_metrics(), TagConfusion(), metrics_of(3, 5)
        for index in shares[rank]:
            metrics.update([GROUPS[index]], [VERDICTS[index]])
            confusion.update([GROUPS[index]], [VERDICTS[index]])
            readings.update(*read_group(index))
        values = metrics.compute(), confusion.compute(), readings.compute(), readings.maps()._asdict()
        results.append((metrics.intervals(), values, metrics.intervals()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_processes_get_the_metrics_of_one_also_with_ragged_shares(tmp_path):
    other = get_context("spawn").Process(target=_measure_on_rank, args=(1, str(tmp_path)))
    other.start()
    try:
        _measure_on_rank(0, str(tmp_path))
    finally:
        other.join(timeout=60)
    assert other.exitcode == 0
    for rank in range(2):
        for shares, result in zip(SHARES, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            indices = [index for share in shares for index in share]
            metrics, confusion, readings = group_metrics(), TagConfusion(), metrics_of(3, 5)
            metrics.update([GROUPS[index] for index in indices], [VERDICTS[index] for index in indices])
            confusion.update([GROUPS[index] for index in indices], [VERDICTS[index] for index in indices])
            for index in indices:
                readings.update(*read_group(index))
            intervals, values, intervals_again = result
            expected = metrics.compute(), confusion.compute(), readings.compute(), readings.maps()._asdict()
            torch.testing.assert_close(values, expected, equal_nan=True)
            assert intervals == intervals_again == metrics.intervals()


def test_the_docs_list_exactly_the_metric_names_of_the_code_with_their_meaning():
    page = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/<>]+)` \| (.*) \|$", page, flags=re.MULTILINE))
    assert rows == DESCRIPTIONS


def test_the_scalars_that_metrics_compute_are_all_described():
    metrics, confusion = group_metrics(), TagConfusion()
    metrics.update(GROUPS, VERDICTS)
    confusion.update(GROUPS, VERDICTS)
    computed = {f"val/{name}" for name in metrics.compute()}
    computed |= {f"tags/{name}" for name, value in confusion.compute().items() if value.dim() == 0}
    assert computed <= set(DESCRIPTIONS)
