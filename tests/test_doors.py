"""Doors: the theorem, the oracle, the environment and the judge."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from lace_lightning.decoding.environment import FREE
from lace_lightning.puzzles import Doors
from lace_lightning.tasks import Verdict
from lace_lightning.traces.template import Segment
from tests.puzzle_helpers import HOSTILE_ANSWERS, decoded_thread

MIXED = Doors(doors=[2, 5, 8, 12], tries=[1, 2, 3])


def _exact_success(strategy: dict[tuple[int, ...], Fraction], doors: int, num_threads: int) -> Fraction:
    """Probability that one of N independent threads that draw their doors from ``strategy`` opens the uniform prize."""
    success = Fraction(0)
    for prize in range(doors):
        hit = sum((p for opened, p in strategy.items() if prize in opened), Fraction(0))
        success += (1 - (1 - hit) ** num_threads) / doors
    return success


def test_no_isolated_strategy_beats_the_ceiling_and_the_uniform_one_reaches_it():
    """Exact enumeration for K=5, T=2, N=3; a miss teaches nothing else, so a strategy is a law over ordered doors."""
    problem = Doors(doors=[5], tries=[2]).problem(0)
    ceiling = Doors().success_ceiling(problem, 3)
    sequences = list(itertools.product(range(5), repeat=2))
    rng = np.random.default_rng(0)
    for concentration in (0.02, 0.3, 1.0, 30.0):
        for _ in range(50):
            weights = [Fraction(int(w * 1e6)) for w in rng.dirichlet([concentration] * len(sequences))]
            law = {s: w / sum(weights) for s, w in zip(sequences, weights, strict=True)}
            assert _exact_success(law, 5, 3) <= ceiling + 1e-12
    distinct = list(itertools.permutations(range(5), 2))
    uniform = _exact_success({s: Fraction(1, len(distinct)) for s in distinct}, 5, 3)
    assert float(uniform) == pytest.approx(ceiling, abs=1e-12)


def _play(choose, doors=8, tries=2, num_threads=4, groups=20_000) -> float:
    """Share of groups with a thread that the environment told hit; ``choose(round, previous)`` gives (B, N) doors."""
    puzzle = Doors(doors=[doors], tries=[tries])
    tokenizer = puzzle.tokenizer()
    first, hit = (tokenizer.convert_tokens_to_ids(word) for word in ("1", "hit"))
    problems = [puzzle.problem(i, "test") for i in range(groups)]
    environment = puzzle.environment(problems, num_threads, tokenizer)
    everyone = torch.ones(groups, num_threads, dtype=torch.bool)
    is_found = torch.zeros_like(everyone)
    opened = torch.zeros(groups, num_threads, 0, dtype=torch.long)
    for _ in range(tries):
        doors_now = choose(opened, torch.full((groups, num_threads), doors))
        opened = torch.cat([opened, doors_now[..., None]], dim=-1)
        assert (environment.step(doors_now + first, everyone) == FREE).all()
        verdict = environment.step(doors_now + first, everyone)
        is_found |= verdict == hit
        environment.step(verdict, everyone)
    return is_found.any(dim=1).double().mean().item()


def _distinct(opened, doors):
    """Uniform among the doors that the thread itself has not opened."""
    weights = torch.ones(*doors.shape, int(doors[0, 0])).scatter(-1, opened, 0.0)
    return torch.multinomial(weights.flatten(0, 1), 1).view(doors.shape)


def _memoryless(opened, doors):
    return (torch.rand(doors.shape) * doors).long()


def _biased(opened, doors):
    """Everybody prefers low doors: identical habits, so threads open the same ones."""
    return (torch.rand(doors.shape) ** 3 * doors).long()


def _divided(opened, doors):
    """What only threads that differ can do: thread n opens doors of its own."""
    return (torch.arange(doors.shape[1]) * 2 + opened.shape[-1]).expand(doors.shape)


@pytest.mark.parametrize(
    ("choose", "expected"),
    [(_distinct, 1 - 0.75**4), (_memoryless, 1 - (7 / 8) ** 8), (_biased, None), (_divided, 1.0)],
)
def test_played_against_the_environment_isolated_threads_stay_at_the_ceiling(choose, expected):
    torch.manual_seed(0)
    ceiling = Doors().success_ceiling(Doors().problem(0), 4)
    assert ceiling == pytest.approx(0.68359375)
    success, interval = _play(choose), 3 * (0.25 / 20_000) ** 0.5
    if expected is not None:
        assert success == pytest.approx(expected, abs=interval)
    assert (success > ceiling + interval) == (choose is _divided)


@pytest.mark.parametrize(
    ("doors", "tries", "num_threads", "ceiling"), [(8, 2, 1, 0.25), (4, 1, 2, 0.4375), (3, 3, 1, 1), (2, 5, 4, 1)]
)
def test_ceiling_by_hand(doors, tries, num_threads, ceiling):
    puzzle = Doors(doors=[doors], tries=[tries])
    assert puzzle.success_ceiling(puzzle.problem(0), num_threads) == pytest.approx(ceiling)


def test_oracle_success_is_that_of_the_prototype():
    puzzle = Doors()
    found = sum(any(t.text.endswith("hit") for t in puzzle.trace(i, 4).threads) for i in range(20_000))
    assert found / 20_000 == pytest.approx(0.978, abs=0.004)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_forced_spans_are_exactly_the_verdicts_and_every_verdict_is_true(num_threads):
    for i in range(200):
        trace = MIXED.trace(i, num_threads)
        prize = str(trace.problem.facts["prize"])
        for thread in trace.threads:
            words = thread.text.split()
            assert words[2::3] == ["hit" if door == prize else "miss" for door in words[1::3]]
            assert [thread.text[start:end] for start, end in thread.forced] == words[2::3]
            assert len(words) == 3 * trace.problem.facts["tries"]
            assert thread.answer == (prize if "hit" in words else words[-2])


def test_a_lone_thread_opens_no_door_twice_and_is_its_own_best():
    puzzle = Doors(doors=[4], tries=[4])
    for i in range(100):
        (thread,) = puzzle.trace(i, 1).threads
        words = thread.text.split()
        opened = [door for door, verdict in zip(words[1::3], words[2::3], strict=True) if verdict == "miss"]
        assert len(set(opened)) == len(opened)
        assert thread.tag == "[[best]]" and "hit" in words


def test_environment_forces_exactly_what_traces_show_however_threads_are_delayed():
    """Encoded traces written thread by thread, each thread pausing at random: only written tokens count."""
    tokenizer, num_threads = MIXED.tokenizer(), 4
    traces = [MIXED.trace(i, num_threads) for i in range(64)]
    encoded = [[MIXED.template.encode_thread(thread, tokenizer) for thread in trace.threads] for trace in traces]
    environment = MIXED.environment([trace.problem for trace in traces], num_threads, tokenizer)
    place = torch.zeros(len(traces), num_threads, dtype=torch.long)
    lengths = torch.tensor([[len(thread.ids) for thread in threads] for threads in encoded])
    generator = torch.Generator().manual_seed(0)
    num_forced = 0
    while (place < lengths).any():
        written = (torch.rand(place.shape, generator=generator) < 0.6) & (place < lengths)
        tokens = torch.full_like(place, tokenizer.convert_tokens_to_ids("3"))  # undefined where not written
        expected = torch.full_like(place, FREE)
        for b, n in written.nonzero().tolist():
            thread, t = encoded[b][n], int(place[b, n])
            tokens[b, n] = thread.ids[t]
            if t + 1 < len(thread.ids) and thread.segments[t + 1] == Segment.ENVIRONMENT:
                expected[b, n] = thread.ids[t + 1]
        assert torch.equal(environment.step(tokens, written), expected)
        num_forced += int((expected != FREE).sum())
        place += written
    assert num_forced == sum(4 * trace.problem.facts["tries"] for trace in traces)


def test_environment_calls_anything_but_the_prize_a_miss():
    puzzle = Doors()
    tokenizer = puzzle.tokenizer()
    problem = puzzle.problem(0)
    environment = puzzle.environment([problem], tokenizer.vocab_size, tokenizer)
    every_token = torch.arange(tokenizer.vocab_size)[None]
    environment.step(every_token, torch.ones_like(every_token, dtype=torch.bool))
    verdict = environment.step(every_token, torch.ones_like(every_token, dtype=torch.bool))[0]
    hits = (verdict == tokenizer.convert_tokens_to_ids("hit")).nonzero().flatten().tolist()
    assert hits == [tokenizer.convert_tokens_to_ids(problem.answer)]
    assert (verdict == tokenizer.convert_tokens_to_ids("miss")).sum() == tokenizer.vocab_size - 1


def test_environment_refuses_a_tokenizer_without_its_words():
    with pytest.raises(ValueError, match=r"lacks the words \['9'.*tokenizer\(\)"):
        Doors().environment([Doors().problem(0)], 4, Doors(max_doors=8).tokenizer())


@pytest.mark.parametrize(
    ("answer", "observations", "verdict"),
    [
        ("prize", ("miss", "hit"), Verdict.CORRECT),
        ("prize", ("hit",), Verdict.CORRECT),
        ("prize", ("miss", "miss"), Verdict.WRONG),  # adopted from another thread
        ("prize", (), Verdict.WRONG),
        ("other", ("miss", "hit"), Verdict.WRONG),
        ("other", ("miss", "miss"), Verdict.WRONG),
        ("9", ("hit",), Verdict.UNPARSABLE),
        ("0", ("hit",), Verdict.UNPARSABLE),
        ("08", ("hit",), Verdict.UNPARSABLE),
    ],
)
def test_a_success_counts_only_with_an_own_hit(answer, observations, verdict):
    puzzle = Doors()
    problem = puzzle.problem(0)
    other = str(problem.facts["prize"] % 8 + 1)
    thread = decoded_thread({"prize": problem.answer, "other": other}.get(answer, answer), observations)
    assert puzzle.judge([(problem, thread)]) == [verdict]


def test_hostile_answers_are_unparsable():
    puzzle = Doors()
    items = [(puzzle.problem(0), decoded_thread(answer, ("hit",))) for answer in HOSTILE_ANSWERS]
    assert set(puzzle.judge(items)) == {Verdict.UNPARSABLE}


def test_every_size_is_drawn_stands_in_the_prompt_and_hides_the_prize():
    problems = [MIXED.problem(i) for i in range(400)]
    for problem in problems:
        assert problem.text == f"doors {problem.facts['doors']} tries {problem.facts['tries']}"
    sizes = {(problem.facts["doors"], problem.facts["tries"]) for problem in problems}
    assert sizes == set(itertools.product(MIXED.doors, MIXED.tries))
    prizes = [problem.facts["prize"] for problem in problems if problem.facts["doors"] == 8]
    assert set(prizes) == set(range(1, 9))


@pytest.mark.parametrize("options", [{"doors": [17]}, {"doors": []}, {"doors": [0]}, {"tries": [0]}, {"tries": [17]}])
def test_sizes_outside_the_vocabulary_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        Doors(**options)
