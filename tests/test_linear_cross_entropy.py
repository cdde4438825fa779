"""The head's cross-entropy in chunks against the one from all logits at once, in values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lace_lightning import linear_cross_entropy as module
from lace_lightning.linear_cross_entropy import linear_cross_entropy
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, Tokens, ragged_groups, tiny_backbone, tiny_lm, wake

TOKENS, WIDTH, VOCABULARY = 13, 6, 23


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)


def exact(hidden: Tensor, weight: Tensor, tokens: Tensor, weights: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, tokens, reduction="none") * weights).sum()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_size", [4, 13, 4096])
def test_loss_and_gradients_are_those_of_all_logits_at_once(softcap, chunk_size):
    hidden, weight, tokens, weights = inputs()
    expected = exact(hidden, weight, tokens, weights, softcap)
    found = linear_cross_entropy(hidden, weight, tokens, weights, softcap, chunk_size)
    # the loss is summed in float32; a factor behind it reaches the gradients
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    expected_gradients = torch.autograd.grad(3.5 * expected, (hidden, weight))
    for gradient, true in zip(torch.autograd.grad(3.5 * found, (hidden, weight)), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(learns, monkeypatch):
    hidden, weight, tokens, weights = inputs()
    (weight if learns == "hidden" else hidden).requires_grad_(False)
    if learns == "hidden":
        monkeypatch.setattr(module, "_accumulate", None)  # calling it would fail
    linear_cross_entropy(hidden, weight, tokens, weights).backward()
    assert (hidden.grad is None) == (learns == "weight") and (weight.grad is None) == (learns == "hidden")


def test_under_autocast_products_are_bfloat16_and_gradients_have_the_dtype_of_the_weights():
    hidden, weight, tokens, weights = inputs(torch.float32)
    expected = torch.autograd.grad(exact(hidden, weight, tokens, weights, None), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, tokens, weights, chunk_size=5)
    found = torch.autograd.grad(loss, (hidden, weight))
    for gradient, true in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert 1e-4 < (gradient - true).norm() / true.norm() < 0.02


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    sizes, kept = [], []

    def note(logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        sizes.append(len(logits))
        return module.loss_and_slope(logits, *args)

    monkeypatch.setattr(module, "_loss_and_slope", lambda on_cuda: note)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_cross_entropy(*inputs(), chunk_size=5)
    assert sizes == [5, 5, 3] and kept == [(TOKENS, WIDTH), (VOCABULARY, WIDTH)]


# ---------------------------------------------------------------- in a model


def nll_and_gradients(model: ThreadedLM, tokens: Tokens, targets: Tensor, method: str) -> tuple[Tensor, dict]:
    """The mean over scored targets and its gradients, by ``mean_nll`` or from ``token_logprobs``."""
    model.zero_grad()
    arguments = (tokens.input_ids, tokens.attention_mask, targets, tokens.prompt_length)
    if method == "mean_nll":
        loss = model.mean_nll(*arguments, chunk_size=7)
    else:
        logprobs = model.token_logprobs(*arguments)
        loss = -logprobs.sum() / (logprobs != 0).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora_on_the_head() -> ThreadedLM:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    return wake(ThreadedLM(get_peft_model(tiny_backbone("llama"), config), EXCHANGES["causal"], 3, [1, 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_lm(EXCHANGES["causal"]),
        lambda: tiny_lm(EXCHANGES["causal"], "llama"),  # the head is the embedding
        lambda: tiny_lm(EXCHANGES["causal"], "gemma2", "eager"),  # caps its logits
        with_lora_on_the_head,
    ],
    ids=["qwen3", "tied", "capped", "lora"],
)
def test_the_mean_is_that_of_the_tokens_log_probabilities(make):
    model, tokens = make(), ragged_groups()
    targets = tokens.attention_mask.clone()
    targets[0, 1, 7] = False
    found, gradients = nll_and_gradients(model, tokens, targets, "mean_nll")
    expected, true = nll_and_gradients(model, tokens, targets, "token_logprobs")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == true.keys()
    for name, gradient in gradients.items():
        assert (gradient - true[name]).abs().max() <= 2e-5 * true[name].abs().max(), name


def test_the_mean_of_nothing_is_nan():
    model, tokens = tiny_lm(EXCHANGES["causal"]), ragged_groups()
    nothing = torch.zeros_like(tokens.attention_mask)
    assert model.mean_nll(tokens.input_ids, tokens.attention_mask, nothing, tokens.prompt_length).isnan()
