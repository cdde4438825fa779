"""Collation: the lattice that training sees is the one that decoding makes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lace_lightning.traces.batch import TraceBatch
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread
from lace_lightning.traces.template import Segment, Template

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(30)), "now", "assess", *Tag]
TEMPLATE = Template(prompt="{text}", opening=" now assess ", answer="{answer}", separator=" ")
NUM_THREADS = 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZER = make_tokenizer()
OPENING = TEMPLATE.encode_opening(TOKENIZER)


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(30)}" for _ in range(count)]


def make_thread(rng: random.Random, thought: int, answer: int) -> TraceThread:
    """A thread of ``thought`` words, one of them forced if there are two, and ``answer`` words of answer."""
    text = words(rng, thought)
    start = len(" ".join(text[:1]))
    forced = ((start, start + 1 + len(text[1])),) if thought > 1 else ()
    return TraceThread(" ".join(text), " ".join(words(rng, answer)), rng.choice(list(Tag)), forced=forced)


def make_trace(seed: int, lengths: list[tuple[int, int]] | None = None) -> Trace:
    rng = random.Random(seed)
    lengths = lengths or [(rng.randrange(7), rng.randrange(4)) for _ in range(NUM_THREADS)]
    problem = Problem(str(seed), " ".join(words(rng, rng.randrange(1, 5))), "w1")
    return Trace(problem, tuple(make_thread(rng, *length) for length in lengths))


def make_collator(**options: object) -> TraceCollator:
    options = {"num_threads": NUM_THREADS, "max_length": 100} | options
    return TraceCollator(TOKENIZER, TEMPLATE, **options)  # type: ignore[arg-type]


def simulate(threads: list[list[int]], holes: list[dict[int, int]], barrier: bool) -> list[list[int | None]]:
    """Decode, one column at a time, a group whose thread n writes ``threads[n]``; None where it writes nothing.

    ``holes[n][i]`` columns pass before thread n writes its token i. A thread whose ids end with the opening's waits
    until every other one waits or has ended; then all go on.
    """
    lattice: list[list[int | None]] = [[] for _ in threads]
    written: list[list[int]] = [[] for _ in threads]
    holes = [dict(own) for own in holes]
    waits, passed = [False] * len(threads), [not barrier] * len(threads)
    while any(len(own) < len(thread) for own, thread in zip(written, threads, strict=True)):
        for n, thread in enumerate(threads):
            token = None
            if len(written[n]) < len(thread) and not waits[n]:
                if holes[n].get(len(written[n]), 0):
                    holes[n][len(written[n])] -= 1
                else:
                    token = thread[len(written[n])]
                    written[n].append(token)
            lattice[n].append(token)
        for n, own in enumerate(written):
            waits[n] = waits[n] or (not passed[n] and own[-len(OPENING) :] == OPENING)
        if all(w or len(own) == len(t) for w, own, t in zip(waits, written, threads, strict=True)):
            passed = [done or w for done, w in zip(passed, waits, strict=True)]
            waits = [False] * len(threads)
    return lattice


def lattice_of(batch: TraceBatch, b: int) -> list[list[int | None]]:
    """Response columns of one group, cut after its last token."""
    ids, mask = batch.input_ids[b, :, batch.prompt_length :], batch.attention_mask[b, :, batch.prompt_length :]
    length = int(mask.any(0).nonzero().max()) + 1
    return [
        [int(token) if real else None for token, real in zip(*row, strict=True)]
        for row in zip(ids[:, :length].tolist(), mask[:, :length].tolist(), strict=True)
    ]


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=NUM_THREADS, max_size=NUM_THREADS)


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(lengths, min_size=1, max_size=3), barrier=st.booleans())
def test_lattice_equals_column_by_column_decoding(groups: list[list[tuple[int, int]]], barrier: bool) -> None:
    traces = [make_trace(number, group) for number, group in enumerate(groups)]
    batch = make_collator(barrier=barrier)([(trace, number) for number, trace in enumerate(traces)])
    for b, trace in enumerate(traces):
        threads = [TEMPLATE.encode_thread(thread, TOKENIZER).ids for thread in trace.threads]
        assert lattice_of(batch, b) == simulate(threads, [{}] * NUM_THREADS, barrier)


@settings(max_examples=80, deadline=None)
@given(group=lengths, serial=st.integers(0, 10**6), barrier=st.booleans())
def test_jitter_is_one_short_delay_per_thought_and_decoding_does_the_rest(
    group: list[tuple[int, int]], serial: int, barrier: bool
) -> None:
    trace = make_trace(serial, group)
    batch = make_collator(barrier=barrier, jitter=3)([(trace, serial)])
    lattice, holes, threads = lattice_of(batch, 0), [], []
    for thread, row in zip(trace.threads, lattice, strict=True):
        encoded = TEMPLATE.encode_thread(thread, TOKENIZER)
        columns = [column for column, token in enumerate(row) if token is not None][: encoded.assessment_start + 1]
        delays = {
            i: gap for i, gap in enumerate(b - a - 1 for a, b in zip([-1, *columns], columns, strict=False)) if gap
        }
        assert len(delays) <= 1 and all(gap <= 3 for gap in delays.values())
        holes.append(delays)
        threads.append(encoded.ids)
    assert lattice == simulate(threads, holes, barrier)


def test_jitter_uses_every_delay_and_every_place() -> None:
    trace, eos = make_trace(0, [(2, 1)] * NUM_THREADS), TOKENIZER.eos_token_id
    seen = set()
    for serial in range(200):
        row = lattice_of(make_collator(jitter=2, barrier=False)([(trace, serial)]), 0)[0]
        gaps = [column for column, token in enumerate(row) if token is None and column < row.index(eos)]
        seen.add((gaps[0] if gaps else None, len(gaps)))
    assert seen == {(None, 0)} | {(place, delay) for place in range(3) for delay in (1, 2)}


def test_answers_start_together_and_tags_do_not_wait() -> None:
    trace = make_trace(0, [(1, 0), (4, 3), (2, 1)])
    batch = make_collator()([(trace, 0)])
    ends = [columns.nonzero().flatten().tolist() for columns in (batch.segments[0] == Segment.ASSESSMENT)]
    first_answers = [columns[2:3] for columns in ends]
    tags = [(columns == Segment.TAG).nonzero()[0].item() for columns in batch.segments[0]]
    start = batch.prompt_length + 4 + len(OPENING)
    assert first_answers == [[], [start], [start]]
    assert tags == [start, start + 3, start + 1]


def test_prompts_are_padded_left_and_equal_for_all_threads_of_a_group() -> None:
    traces = [make_trace(seed) for seed in range(6)]
    batch = make_collator()([(trace, 0) for trace in traces])
    prompts = [TEMPLATE.encode_prompt(trace.problem.text, TOKENIZER) for trace in traces]
    assert batch.prompt_length == max(map(len, prompts)) and len(set(map(len, prompts))) > 1
    for b, prompt in enumerate(prompts):
        row = [TOKENIZER.pad_token_id] * (batch.prompt_length - len(prompt)) + prompt
        assert batch.input_ids[b, :, : batch.prompt_length].tolist() == [row] * NUM_THREADS
        assert batch.attention_mask[b, 0, : batch.prompt_length].sum() == len(prompt)


def test_every_token_keeps_its_segment_and_holes_have_none() -> None:
    traces = [make_trace(seed) for seed in range(6)]
    batch = make_collator(jitter=2)([(trace, serial) for serial, trace in enumerate(traces)])
    assert torch.equal(batch.attention_mask, batch.segments != Segment.NONE)
    assert (batch.input_ids[~batch.attention_mask] == TOKENIZER.pad_token_id).all()
    for b, trace in enumerate(traces):
        for n, thread in enumerate(trace.threads):
            encoded = TEMPLATE.encode_thread(thread, TOKENIZER)
            real = batch.attention_mask[b, n].clone()
            real[: batch.prompt_length] = False
            assert batch.input_ids[b, n, real].tolist() == encoded.ids
            assert batch.segments[b, n, real].tolist() == encoded.segments


def test_an_example_is_laid_out_alike_in_any_batch_and_differently_at_each_serving() -> None:
    traces = [make_trace(seed, [(6, 2)] * NUM_THREADS) for seed in range(8)]
    collate = make_collator(shuffle_threads=True, jitter=4, seed=1)
    together = collate([(trace, serial) for serial, trace in enumerate(traces)])
    alone = [lattice_of(collate([(trace, serial)]), 0) for serial, trace in reversed(list(enumerate(traces)))]
    assert [lattice_of(together, b) for b in range(8)] == alone[::-1]
    servings = {str(lattice_of(collate([(traces[0], serial)]), 0)) for serial in range(20)}
    assert len(servings) > 15
    other_seed = make_collator(shuffle_threads=True, jitter=4, seed=2)
    assert lattice_of(other_seed([(traces[0], 0)]), 0) != lattice_of(together, 0)


def test_shuffling_serves_every_order_of_the_same_threads() -> None:
    trace = make_trace(3, [(3, 1), (4, 1), (5, 1)])
    plain = lattice_of(make_collator()([(trace, 0)]), 0)
    collate = make_collator(shuffle_threads=True)
    orders = [tuple(plain.index(row) for row in lattice_of(collate([(trace, s)]), 0)) for s in range(600)]
    assert set(map(frozenset, orders)) == {frozenset(range(3))}
    assert all(60 < orders.count(order) < 140 for order in set(orders)) and len(set(orders)) == 6


def test_whether_a_trace_fits_is_exact_and_no_matter_of_chance() -> None:
    trace = make_trace(0, [(5, 0), (1, 3), (2, 2)])
    prompt = len(TEMPLATE.encode_prompt(trace.problem.text, TOKENIZER))
    columns = prompt + 5 + len(OPENING) + 3 + 2  # the longest thought, the opening, the longest answer, tag and end
    assert make_collator(max_length=columns)([(trace, 0)]).input_ids.shape[-1] == columns
    for options in ({"max_length": columns - 1}, {"max_length": columns + 1, "jitter": 2}):
        for serial in range(5):
            with pytest.raises(ValueError, match=rf"up to {columns + options.get('jitter', 0)} columns.*max_length="):
                make_collator(**options)([(trace, serial)])


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (Trace(make_trace(0).problem, make_trace(0).threads[:2]), "has 2 threads, but num_threads=3"),
        (Trace(make_trace(0).problem, (TraceThread("w1 now assess w2", "w1", Tag.BEST),) * 3), "threads.0.*opening"),
        (Trace(make_trace(0).problem, (TraceThread("w1 what", "w1", Tag.BEST),) * 3), "threads.0.*no tokens"),
    ],
)
def test_check_says_why_a_trace_cannot_be_collated(trace: Trace, reason: str) -> None:
    assert make_collator().check(make_trace(0)) == make_trace(0)
    with pytest.raises(ValueError, match=reason):
        make_collator().check(trace)
