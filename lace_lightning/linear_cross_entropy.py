"""Cross-entropy of a linear head whose logits exist for a few tokens at a time only, and are computed once.

A chunk's gradient needs its logits. Recomputing them in the backward pass costs a third more of the head's work; here
each chunk's gradient is made while its logits are at hand, in the forward pass, which knows each token's weight in the
loss (policy-gradient losses do not: see ``ThreadedLM.token_logprobs`` for them).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    softcap: float | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """Weighted sum of the negative log-likelihoods of ``tokens``.

    Args:
        hidden: (M, D) inputs of the head.
        weight: (V, D) of the head.
        tokens: (M,) target ids.
        weights: (M,) float32, what each token counts; constants without a gradient.
        softcap: logits are capped to ``softcap * tanh(logits / softcap)``, as in Gemma 2.
        chunk_size: tokens whose logits exist together.

    Returns:
        () float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, tokens, weights, softcap, chunk_size)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        weights: Tensor,
        softcap: float | None,
        chunk_size: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            logits = hidden[part] @ matrix.T
            loss, slope = _loss_and_slope(hidden.is_cuda)(logits, tokens[part], weights[part], softcap)
            total += loss
            if grad_hidden is not None:
                torch.mm(slope, matrix, out=grad_hidden[part])
            if grad_weight is not None:
                _accumulate(grad_weight, slope, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        gradients = [None if gradient is None else gradient * scale for gradient in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


def _accumulate(grad_weight: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Add the chunk's (V, D) gradient of the head; under autocast that sum is finer than its parts."""
    if grad_weight.dtype == slope.dtype:
        grad_weight.addmm_(slope.T, hidden)
    else:
        grad_weight += slope.T @ hidden


def loss_and_slope(logits: Tensor, tokens: Tensor, weights: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Weighted loss () float32 of a chunk of logits (m, V), and its derivative (m, V) by them in their dtype."""
    capped = logits.float()
    if softcap is not None:
        capped = softcap * torch.tanh(capped / softcap)
    log_sum = capped.logsumexp(-1, keepdim=True)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == tokens[:, None]
    loss = ((log_sum - capped.gather(-1, tokens[:, None])).squeeze(-1) * weights).sum()
    slope = ((capped - log_sum).exp() - is_target.float()) * weights[:, None]
    if softcap is not None:
        slope = slope * (1 - (capped / softcap).square())
    return loss, slope.to(logits.dtype)


@cache
def _loss_and_slope(on_cuda: bool) -> Any:
    """Fused on CUDA, where each of its ten passes over a chunk of logits would take as long as a matrix product."""
    return torch.compile(loss_and_slope) if on_cuda else loss_and_slope
