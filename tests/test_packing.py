"""Tokens scored on packed rows, the prompt computed once per group, against a row per thread (LACE.md §3, claim 5)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lace_lightning.exchange import Isolated
from lace_lightning.packing import pack, unpack
from lace_lightning.threaded_lm import ThreadedLM, previous_token
from tests.helpers import BODIES, CASES, Case, Tokens, lm_of, ragged_groups, random_ids, tiny_lm

PACKED = [case for case in CASES if case.backend != "flex" and "on-prompt" not in case.exchange]


def shapes_embedded(model: ThreadedLM, tokens: Tokens) -> list[torch.Size]:
    """What goes through the backbone when all tokens are scored."""
    shapes = []
    embedding = model.backbone.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    model.token_logprobs(tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length)
    hook.remove()
    return shapes


def from_logits(model: ThreadedLM, tokens: Tokens) -> Tensor:
    """(B, N, L) log-probabilities by a row per thread."""
    logits = model(tokens.input_ids, tokens.attention_mask, tokens.prompt_length)
    previous = previous_token(tokens.attention_mask)
    rows = logits.log_softmax(-1).gather(2, previous.clamp_min(0)[..., None].expand_as(logits))
    logprobs = rows.gather(-1, tokens.input_ids[..., None]).squeeze(-1)
    return logprobs * (tokens.attention_mask & (previous >= 0))


def values_and_gradients(model: ThreadedLM, logprobs: Tensor) -> dict[str, Tensor]:
    """The log-probabilities, and the gradient of a random functional of them on every parameter."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(6))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((logprobs * weights).sum(), parameters, allow_unused=True)
    found = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return {"values": logprobs.detach(), **found}


def assert_packing_changes_nothing(model: ThreadedLM, tokens: Tokens) -> None:
    logprobs = model.token_logprobs(
        tokens.input_ids, tokens.attention_mask, tokens.attention_mask, tokens.prompt_length
    )
    found = values_and_gradients(model, logprobs)
    expected = values_and_gradients(model, from_logits(model, tokens))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6)
        assert error < 2e-5, f"{name}: largest difference is {error:.3g} of the largest entry"


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_groups_have_the_logprobs_and_gradients_of_a_row_per_thread(case):
    """Ragged prompts, waiting columns and early ends included; windows of the backbone span real tokens."""
    model, tokens = lm_of(case), ragged_groups()
    groups, num_threads, columns = tokens.input_ids.shape
    after_prompt = columns - 1 - tokens.prompt_length  # nothing is predicted from the last column
    assert shapes_embedded(model, tokens) == [(groups, tokens.prompt_length + num_threads * after_prompt)]
    assert_packing_changes_nothing(model, tokens)


@pytest.mark.parametrize("backbone, attn", BODIES)
def test_isolated_groups_are_packed_too(backbone, attn):
    model, tokens = tiny_lm(Isolated(), backbone, attn), ragged_groups()
    assert len(shapes_embedded(model, tokens)[0]) == 2 and shapes_embedded(model, tokens)[0][0] == 2
    assert_packing_changes_nothing(model, tokens)


def test_packed_groups_in_which_nobody_waits_are_the_same_too():
    tokens = ragged_groups()
    everything = replace(tokens, attention_mask=torch.ones_like(tokens.attention_mask))
    assert_packing_changes_nothing(lm_of(Case("qwen3", "sdpa", "aligned")), everything)


def other_prompts(tokens: Tokens) -> Tokens:
    return tokens.with_ids(random_ids(*tokens.input_ids.shape))


def other_padding(tokens: Tokens) -> Tokens:
    mask = tokens.attention_mask.clone()
    mask[1, 0, 1] = False
    return replace(tokens, attention_mask=mask)


def short_prompt(tokens: Tokens) -> Tokens:
    return replace(tokens, prompt_length=1)


@pytest.mark.parametrize("change", [other_prompts, other_padding, short_prompt])
def test_groups_without_much_to_share_keep_a_row_per_thread(change):
    model, tokens = lm_of(Case("qwen3", "sdpa", "causal")), change(ragged_groups())
    assert shapes_embedded(model, tokens) == [(6, 12)]
    assert_packing_changes_nothing(model, tokens)


@pytest.mark.parametrize("exchange", ["on-prompt", "aligned-on-prompt"])
def test_threads_that_exchange_on_the_prompt_keep_a_row_each(exchange):
    model, tokens = lm_of(Case("qwen3", "sdpa", exchange)), ragged_groups()
    assert shapes_embedded(model, tokens) == [(6, 12)]
    assert_packing_changes_nothing(model, tokens)


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_groups_that_are_all_prompt_can_be_scored(columns):
    model, ids = lm_of(Case("qwen3", "sdpa", "causal")), random_ids(2, 1, columns).expand(-1, 3, -1)
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), columns)
    found = model.token_logprobs(tokens.input_ids, tokens.attention_mask, tokens.attention_mask, columns)
    torch.testing.assert_close(found, from_logits(model, tokens), rtol=0, atol=1e-4)


def test_packing_and_unpacking_are_inverse():
    x = torch.randn(2, 3, 7, 5)
    x[:, 1:, :4] = x[:, :1, :4]
    assert pack(x, 4).shape == (2, 4 + 3 * 3, 5)
    assert torch.equal(unpack(pack(x, 4), 3, 4), x)
