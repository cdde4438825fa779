"""What holds for every puzzle: reproducible problems, disjoint splits, traces that read back as they were meant."""

import hashlib
import pickle

import pytest

from lace_lightning.puzzles import Countdown, Doors, Find
from lace_lightning.traces.schema import Tag
from lace_lightning.traces.tags import parse_answer, parse_tag

PUZZLES = [Doors(doors=[3, 8, 16], tries=[1, 2, 3]), Find(), Countdown(), Countdown(numbers=4, max_number=30)]


@pytest.fixture(params=PUZZLES, ids=lambda puzzle: f"{type(puzzle).__name__}-{len(puzzle.words)}")
def puzzle(request):
    return request.param


def test_traces_read_back_without_unknown_words(puzzle):
    """Encode, decode, split and parse every thread: text, answer and tag come back, and nothing becomes <unk>."""
    tokenizer, template = puzzle.tokenizer(), puzzle.template
    template.encode_opening(tokenizer)
    for i in range(40):
        trace = puzzle.trace(i, 4)
        assert tokenizer.unk_token_id not in template.encode_prompt(trace.problem.text, tokenizer)
        for thread in trace.threads:
            ids = template.encode_thread(thread, tokenizer).ids
            assert tokenizer.unk_token_id not in ids
            thought, _, assessment = tokenizer.decode(ids, skip_special_tokens=True).partition(template.opening)
            assert thought.strip() == thread.text
            assert parse_answer(assessment) == thread.answer
            assert parse_tag(assessment) == thread.tag


@pytest.mark.parametrize("num_threads", [1, 2, 4, 8])
def test_tags_are_valid_and_tell_finders_from_the_rest(puzzle, num_threads):
    for i in range(40):
        threads = puzzle.trace(i, num_threads).threads
        assert len(threads) == num_threads
        assert [thread.tag for thread in threads].count(Tag.BEST) == 1
        found = [thread.text.endswith("hit") for thread in threads]
        best = [thread.tag for thread in threads].index(Tag.BEST)
        assert best == (found.index(True) if any(found) else 0)
        for n, thread in enumerate(threads):
            assert n == best or thread.tag == (Tag.SUCCESS if found[n] else Tag.FAIL)


def test_a_trace_belongs_to_its_problem_whatever_the_number_of_threads(puzzle):
    for split in ("train", "test"):
        for i in range(10):
            problem = puzzle.problem(i, split)
            assert puzzle.trace(i, 1, split).problem == puzzle.trace(i, 4, split).problem == problem


def test_problem_ids_are_unique_over_splits(puzzle):
    problems = [puzzle.problem(i, split) for i in range(50) for split in ("train", "test")]
    assert len({problem.id for problem in problems}) == 100


def test_another_seed_split_or_index_gives_another_stream(puzzle):
    def texts(puzzle, split, start=0):
        return [str(puzzle.trace(i, 2, split).threads) for i in range(start, start + 30)]

    options = {
        key: getattr(puzzle, key) for key in ("doors", "primes", "numbers", "max_number") if hasattr(puzzle, key)
    }
    other_seed = type(puzzle)(**options, seed=1)
    streams = [texts(puzzle, "train"), texts(puzzle, "test"), texts(puzzle, "train", 30), texts(other_seed, "train")]
    for k, stream in enumerate(streams):
        for other in streams[:k]:
            assert sum(a == b for a, b in zip(stream, other, strict=True)) < 10


@pytest.mark.parametrize("make", [lambda seed: Find(seed=seed), lambda seed: Countdown(max_number=12, seed=seed)])
def test_train_and_test_share_no_problem_over_all_seeds(make):
    def keys(split):
        problems = [make(seed).problem(i, split) for seed in range(3) for i in range(200)]
        return {
            (*sorted(p.facts["numbers"]), p.facts["target"]) if "numbers" in p.facts else tuple(p.facts.values())
            for p in problems
        }

    train, test = keys("train"), keys("test")
    assert len(train) > 100 and len(test) > 30
    assert not train & test


GOLDEN = {
    "Doors": "3f1bc53258bfa253",
    "Find": "e590ab41340ed836",
    "Countdown": "b4e0d699b323a05f",
}


@pytest.mark.parametrize("make", [Doors, Find, Countdown])
def test_traces_are_the_same_for_ever(make):
    """Digest of 100 traces, written down once: independent of process, hash seed, platform and Python version."""
    traces = repr([make(seed=7).trace(i, 4, split) for i in range(50) for split in ("train", "test")])
    assert hashlib.sha256(traces.encode()).hexdigest()[:16] == GOLDEN[make.__name__]


def test_a_worker_process_can_be_handed_a_puzzle(puzzle):
    """DataLoader workers that are spawned, not forked, receive it pickled."""
    assert pickle.loads(pickle.dumps(puzzle)).trace(3, 4) == puzzle.trace(3, 4)


def test_unknown_splits_and_empty_groups_are_refused(puzzle):
    with pytest.raises(ValueError, match="split='validation'"):
        puzzle.problem(0, "validation")
    with pytest.raises(ValueError, match="num_threads=0"):
        puzzle.trace(0, 0)
