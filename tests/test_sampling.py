"""Sampling against transformers' logits warpers, and the counter-based random numbers that feed it."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lace_lightning.decoding import Sampling, group_seed
from lace_lightning.decoding.random import uniform

# ---------------------------------------------------------------- random numbers

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), in Python's whole numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def test_the_reference_is_splitmix64():
    """First outputs of the published generator for seed 1234567."""
    outputs = [mix((1234567 + (i + 1) * GOLDEN_GAMMA) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62 + 7, 2**63 - 1])
def test_uniform_is_the_counter_th_output_of_splitmix64_from_the_mixed_seed(seed):
    num_threads = 3
    for column in (0, 1, 2, 7, 5000):
        found = uniform(torch.tensor([seed]), num_threads, column)[0].tolist()
        for thread in range(num_threads):
            counter = column * num_threads + thread + 1
            bits = mix((mix(seed) + counter * GOLDEN_GAMMA) & MASK)
            assert found[thread] == (bits >> 11) / 2**53


def test_uniform_does_not_depend_on_the_batch_it_is_drawn_in():
    seeds = torch.tensor([5, 8, 11])
    together = uniform(seeds, 4, 9)
    assert all(torch.equal(uniform(seeds[[i]], 4, 9)[0], together[i]) for i in range(3))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def test_draws_are_uniform_and_independent_of_their_neighbours():
    """Consecutive seeds, threads and columns: the inputs that differ least."""
    draws = torch.stack([uniform(torch.arange(400), 8, column) for column in range(64)])  # (columns, seeds, threads)
    count = draws.numel()
    four_sigma = 4 / math.sqrt(count)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean().item() - 1 / 2) < four_sigma * math.sqrt(1 / 12)
    assert abs(draws.var().item() - 1 / 12) < four_sigma * math.sqrt(1 / 180)
    buckets = torch.histc(draws.float(), 64, 0, 1)
    chi_square = ((buckets - count / 64) ** 2 / (count / 64)).sum().item()
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)
    for dim in range(3):
        near, far = draws.narrow(dim, 0, draws.shape[dim] - 1), draws.narrow(dim, 1, draws.shape[dim] - 1)
        assert abs(correlation(near, far)) < 1.1 * four_sigma
    # The same number of the group's stream, column * N + n, under different N and seeds
    assert abs(correlation(draws[:, :-1, 0], draws[:, 1:, -1])) < 3.2 * four_sigma
    assert draws.unique().numel() == count


def test_group_seeds_are_stable_and_tell_their_parts_apart():
    assert group_seed(0, "How many?", 1) == 2980647352062557825
    assert len({group_seed(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), ("", "a", "b"), ("b", "a")]}) == 5
    assert all(0 <= group_seed(i) < 2**63 for i in range(1000))
    bits = torch.tensor([group_seed(i) for i in range(4000)])
    share = torch.stack([(bits >> bit & 1).double().mean() for bit in range(63)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4000)


# ---------------------------------------------------------------- truncation


def transformers_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Each rule takes what the one before left, in the order of transformers' ``generate``."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits.double()).softmax(-1)


SETTINGS = [
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=1.7, top_k=5, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=500, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.7, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=1e-6, min_p=0.0),
    dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.2),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=1.0),
    dict(temperature=1.0, top_k=3, top_p=0.7, min_p=0.0),
    dict(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_truncation_equals_transformers_warpers(settings):
    logits = torch.randn(20, 30) * 2
    found = Sampling(**settings).probabilities(logits)
    expected = transformers_probabilities(logits, **settings)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found == 0, expected == 0)


def test_top_p_counts_the_mass_that_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 top_k leaves 4/7 and 3/7; the first alone reaches p = 0.5, which 0.4 would not."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    found = Sampling(top_k=2, top_p=0.5).probabilities(logits)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2], SETTINGS[-1]], ids=str)
def test_tokens_are_drawn_as_often_as_they_are_probable(settings):
    sampling, draws = Sampling(**settings), 40_000
    logits = torch.randn(30) * 1.5
    numbers = uniform(torch.arange(draws), 1, 3)[:, 0]
    tokens = sampling.draw(logits.expand(draws, -1), numbers)
    counts = torch.bincount(tokens, minlength=30).double()
    expected = transformers_probabilities(logits[None], **settings)[0] * draws
    assert not counts[expected == 0].any()
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    logits = probabilities.log()
    for number, token in [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)]:
        assert Sampling().draw(logits, torch.tensor(number, dtype=torch.float64)) == token


def test_temperature_zero_takes_the_most_probable_token_whatever_the_random_number():
    logits = torch.randn(2, 3, 50)
    for number in (0.0, 0.5, 1 - 2**-53):
        assert torch.equal(Sampling(temperature=0).draw(logits, torch.full((2, 3), number)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-37])
def test_ever_smaller_temperatures_tend_to_the_most_probable_token(temperature):
    logits = torch.randn(40, 50) * 30
    draws = Sampling(temperature=temperature, top_p=0.9, min_p=0.1).draw(logits, torch.rand(40))
    assert torch.equal(draws, logits.argmax(-1))


@pytest.mark.parametrize(
    "option, value",
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5)],
)
def test_options_out_of_range_are_named_with_their_value(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        Sampling(**{option: value})
