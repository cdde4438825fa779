"""Gate and attention statistics on readings worked out by hand, on a real model, and summed over processes."""

import pytest
import torch

from lace_lightning.decoding import Rollout
from lace_lightning.decoding.segments import Segmenter
from lace_lightning.figures import confusion_figure, gate_figure, thread_figure
from lace_lightning.lattice import Reading
from lace_lightning.metrics import DESCRIPTIONS, ReadingMaps, ReadingMetrics
from lace_lightning.puzzles import Doors
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.template import Segment
from tests.helpers import EXCHANGES, random_ids, tiny_lm

T, E, A, G = (int(segment) for segment in (Segment.THOUGHT, Segment.ENVIRONMENT, Segment.ASSESSMENT, Segment.TAG))
NAN = float("nan")


def segments_of(rollout_like: list[list[int]]) -> torch.Tensor:
    return torch.tensor([rollout_like], dtype=torch.uint8)


# One group, two threads, four columns; thread 1 waits in column 2 and has ended in column 3.
SEGMENTS = segments_of([[T, E, A, G], [T, A, 0, 0]])
# Whatever stands at invisible positions must not count.
GATE = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.9, 99.0, 99.0]]])
CROSS = torch.tensor([[[NAN, 0.5, 0.25, 0.75], [0.5, 1.0, NAN, NAN]]])
SHARE = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]])


def reading(layer: int, gate=GATE, cross=CROSS, share=SHARE) -> Reading:
    return Reading(layer, gate, cross, share, torch.ones_like(gate, dtype=torch.bool))


def metrics_of(*layers: int, **options) -> ReadingMetrics:
    return ReadingMetrics(layers, **{"num_threads": 2, "num_columns": 4, "num_bins": 2, **options})


def test_scalars_are_the_token_means_worked_out_by_hand():
    metrics = metrics_of(3, 5)
    metrics.update([reading(3), reading(5, gate=GATE / 2, cross=CROSS * 0)], SEGMENTS)
    mean = (0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.9) / 6
    expected = {
        "gate/layer_3": mean,
        "gate/layer_5": mean / 2,
        "gate/thought": (0.1 + 0.5) / 2 * 0.75,  # half of layer 3's in layer 5
        "gate/environment": 0.2 * 0.75,
        "gate/assessment": (0.3 + 0.9) / 2 * 0.75,
        "gate/tag": 0.4 * 0.75,
        "cross_ratio/layer_3": (0.5 + 0.25 + 0.75 + 0.5 + 1.0) / 5,  # the first token reads nothing
        "cross_ratio/layer_5": 0.0,
        "cross_ratio/mean": (0.5 + 0.25 + 0.75 + 0.5 + 1.0) / 10,
    }
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(expected)


def test_maps_are_the_cell_means_worked_out_by_hand():
    metrics = metrics_of(3)
    metrics.update([reading(3)], SEGMENTS)
    maps = metrics.maps()
    torch.testing.assert_close(maps.gate_by_segment, torch.tensor([[0.3, 0.2, 0.6, 0.4]]))
    # columns 0 and 1 in the first bin, 2 and 3 (of thread 0 only) in the second
    torch.testing.assert_close(maps.gate_by_time, torch.tensor([[(0.1 + 0.2 + 0.5 + 0.9) / 4, (0.3 + 0.4) / 2]]))
    torch.testing.assert_close(maps.thread_share, SHARE[0])


def test_thread_share_averages_only_rows_that_read():
    metrics = metrics_of(3)
    metrics.update([reading(3)], SEGMENTS)
    metrics.update([reading(3, share=torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))], SEGMENTS)  # thread 1 reads nothing
    torch.testing.assert_close(metrics.maps().thread_share, torch.tensor([[0.25, 0.75], [0.75, 0.25]]))


def test_prompt_columns_of_a_reading_are_not_counted():
    metrics, with_prompt = metrics_of(3), metrics_of(3)
    metrics.update([reading(3)], SEGMENTS)
    prompt = torch.full((1, 2, 3), 7.0)
    with_prompt.update([reading(3, torch.cat([prompt, GATE], -1), torch.cat([prompt, CROSS], -1))], SEGMENTS)
    torch.testing.assert_close(with_prompt.compute(), metrics.compute())


@pytest.mark.parametrize(
    ("num_columns", "num_bins", "width", "num_reached"), [(4, 32, 1, 4), (100, 10, 10, 1), (5, 2, 3, 2), (6, 3, 2, 2)]
)
def test_time_is_cut_into_bins_of_equal_width_and_empty_ends_are_left_out(num_columns, num_bins, width, num_reached):
    metrics = metrics_of(3, num_columns=num_columns, num_bins=num_bins)
    metrics.update([reading(3)], SEGMENTS)
    assert metrics.bin_width == width
    assert metrics.maps().gate_by_time.shape == (1, num_reached)


def test_summing_the_states_of_two_processes_equals_one_process_that_saw_everything():
    torch.manual_seed(1)
    batches = [(reading(3, torch.rand(1, 2, 4), torch.rand(1, 2, 4), torch.rand(1, 2, 2)), SEGMENTS) for _ in range(3)]
    alone, first, second = metrics_of(3), metrics_of(3), metrics_of(3)
    for index, (one, segments) in enumerate(batches):
        alone.update([one], segments)
        (first if index else second).update([one], segments)
    # what torchmetrics does with dist_reduce_fx="sum"
    for name, reduction in first._reductions.items():
        setattr(first, name, reduction(torch.stack([getattr(first, name), getattr(second, name)])))
    torch.testing.assert_close(first.compute(), alone.compute())
    for ours, theirs in zip(first.maps(), alone.maps(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_metrics_that_saw_nothing_are_nan_and_their_time_map_is_empty():
    metrics = metrics_of(3)
    metrics.update([], SEGMENTS)
    assert all(value.isnan() for value in metrics.compute().values())
    assert metrics.maps().gate_by_time.shape == (1, 0)


@pytest.mark.parametrize("options", [{"num_columns": 0}, {"num_bins": 0}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match="num_columns=.* and num_bins="):
        metrics_of(3, **options)


# ---------------------------------------------------------------- on a real model


@pytest.mark.parametrize("exchange", ["causal", "aligned", "on-prompt", "causal-others", "causal-own"])
def test_shares_of_a_real_model_add_up(exchange):
    model = tiny_lm(EXCHANGES[exchange], num_threads=3)
    ids, prompt_length = random_ids(2, 3, 9), 3
    segments = torch.full((2, 3, 6), T, dtype=torch.uint8)
    metrics = ReadingMetrics(sorted(model.exchange_at), num_threads=3, num_columns=6)
    metrics.update(model.read(ids, None, prompt_length), segments)
    values, maps = metrics.compute(), metrics.maps()
    torch.testing.assert_close(maps.thread_share.sum(1), torch.ones(3))
    assert 0 < values["gate/layer_1"] < 1
    # the share on others from the tokens' side and from the threads' side: equal only if tokens weigh equally
    expected = {"causal-others": 1.0, "causal-own": 0.0}.get(exchange)
    if expected is not None:
        assert values["cross_ratio/mean"] == pytest.approx(expected, abs=1e-6)
        assert maps.thread_share.diagonal().sum() == pytest.approx(3 * (1 - expected), abs=1e-5)
    elif exchange == "aligned":  # every token reads three positions, so both sides weigh alike
        assert values["cross_ratio/mean"] == pytest.approx(1 - maps.thread_share.diagonal().mean().item(), abs=1e-5)


def test_scalars_are_all_in_the_list_of_names():
    metrics = metrics_of(3)
    metrics.update([], SEGMENTS)
    names = {name.replace("_3", "_<i>") for name in metrics.compute()}
    assert names <= set(DESCRIPTIONS)


# ---------------------------------------------------------------- segments


def rollout_of(batch) -> Rollout:
    """The traces of a batch as if they had been decoded."""
    return Rollout(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        forced=batch.segments == Segment.ENVIRONMENT,
        logprobs=torch.zeros(batch.input_ids.shape),
        prompt_length=batch.prompt_length,
        finished=torch.ones(batch.input_ids.shape[:2], dtype=torch.bool),
    )


def test_segments_of_a_rollout_are_those_that_training_data_has():
    task = Doors(doors=(3, 8), tries=(1, 3))  # threads and prompts of different lengths, waiting columns among them
    tokenizer = task.tokenizer()
    collator = TraceCollator(tokenizer, task.template, num_threads=4, max_length=64, jitter=2)
    batch = collator([(task.trace(index, 4), index) for index in range(6)])
    assert {int(value) for value in batch.segments.unique()} == set(range(6))
    segments = Segmenter(task.template, tokenizer).rollout(rollout_of(batch))
    assert torch.equal(segments, batch.segments)


def test_threads_without_opening_or_tag_keep_their_last_segment():
    task = Doors()
    tokenizer = task.tokenizer()
    segmenter = Segmenter(task.template, tokenizer)

    def names(text: str) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [segment.name for segment in segmenter.thread(ids, [False] * len(ids))]

    assert names("3 4 [[best]]") == ["THOUGHT"] * 3  # a tag that assesses nothing
    assert names("3 ; 4 5") == ["THOUGHT", *["ASSESSMENT"] * 3]
    assert names("3 ; 4 [[best]] [[fail]] 5") == ["THOUGHT", *["ASSESSMENT"] * 2, *["TAG"] * 3]
    assert names("3 ; 4 <eos>") == ["THOUGHT", *["ASSESSMENT"] * 2, "TAG"]
    assert names("") == []


# ---------------------------------------------------------------- figures


def test_figures_show_the_arrays_they_are_given_on_one_scale():
    torch.manual_seed(2)
    maps = ReadingMaps(torch.rand(2, 4), torch.rand(2, 5), torch.rand(3, 3))
    left, right, _ = gate_figure(maps, layers=[14, 16], bin_width=8).axes
    for axes, values in ((left, maps.gate_by_segment), (right, maps.gate_by_time)):
        torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data), values)
        assert axes.images[0].get_clim() == (0.0, 1.0)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["14", "16"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["thought", "environment", "assessment", "tag"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "8", "16", "24", "32"]
    threads = thread_figure(maps.thread_share).axes[0]
    torch.testing.assert_close(torch.from_numpy(threads.images[0].get_array().data), maps.thread_share)


def test_the_confusion_figure_writes_each_count_into_its_cell():
    counts = torch.arange(12).view(3, 4)
    axes = confusion_figure(counts).axes[0]
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {(row, column): str(4 * row + column) for row in range(3) for column in range(4)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["[[best]]", "[[success]]", "[[fail]]", "none"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["correct", "wrong", "unparsable"]
