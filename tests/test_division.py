"""How the oracle's threads divide a search."""

import itertools
from random import Random

import pytest

from lace_lightning.puzzles.division import Attempt, assess, divide_search
from lace_lightning.traces.schema import Tag

SHAPES = [(8, 1, 4, 2), (8, 1, 1, 2), (3, 1, 4, 3), (6, 3, 4, 2), (1, 1, 3, 2), (5, 0, 2, 4)]


def _searches(candidates, winners, num_threads, tries, count=300):
    for seed in range(count):
        rng = Random(seed)
        chosen = set(rng.sample(range(candidates), winners))
        yield chosen, divide_search(range(candidates), chosen, num_threads, tries, rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_propose_only_what_nobody_tried_until_they_have_found_a_winner(shape):
    for winners, attempts in _searches(*shape):
        tried: set[int] = set()
        for r, now in enumerate(zip(*attempts, strict=True)):
            for n, attempt in enumerate(now):
                if r and attempts[n][r - 1].is_hit:
                    assert attempt == Attempt(*[attempts[n][r - 1].committed] * 2, True)
                elif len(tried) < shape[0]:
                    assert attempt.proposed not in tried
                elif winners:
                    assert attempt.proposed in winners
            tried |= {attempt.committed for attempt in now}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_lowest_of_equal_proposals_keeps_it_while_there_is_another_choice(shape):
    for _, attempts in _searches(*shape):
        tried: set[int] = set()
        for r, now in enumerate(zip(*attempts, strict=True)):
            free = set(range(shape[0])) - tried - {attempt.proposed for attempt in now}
            for n, attempt in enumerate(now):
                repeats = r and attempts[n][r - 1].is_hit
                if free and not repeats and attempt.proposed in {other.proposed for other in now[:n]}:
                    assert attempt.committed in free
                else:
                    assert attempt.committed == attempt.proposed
            tried |= {attempt.committed for attempt in now}


def test_proposals_and_evasions_are_uniform():
    """Two threads, two rounds of four candidates without a winner: every order of first commitments is as likely."""
    pairs = [(a[0].committed, b[0].committed) for _, (a, b) in _searches(4, 0, 2, 1, count=6000)]
    expected = 6000 / 12
    for pair in itertools.permutations(range(4), 2):
        assert abs(pairs.count(pair) - expected) < 5 * expected**0.5
    assert all(a != b for a, b in pairs)


@pytest.mark.parametrize(
    ("found", "tags"),
    [
        ([False, True, True, False], [Tag.FAIL, Tag.BEST, Tag.SUCCESS, Tag.FAIL]),
        ([True, False], [Tag.BEST, Tag.FAIL]),
        ([False, False, False], [Tag.BEST, Tag.FAIL, Tag.FAIL]),
        ([False], [Tag.BEST]),
        ([True], [Tag.BEST]),
    ],
)
def test_the_lowest_finder_is_best_and_thread_0_if_there_is_none(found, tags):
    assert assess([[Attempt(1, 1, False), Attempt(1, 1, hit)] for hit in found]) == tags
