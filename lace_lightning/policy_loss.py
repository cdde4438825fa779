"""Clipped policy-gradient losses over groups of threads (LACE.md §6.3).

GRPO, Dr.GRPO and DAPO differ in how token losses are averaged and in the upper clip; the clipped surrogate is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Average = Literal["grpo", "dr_grpo", "dapo"]


@dataclass(frozen=True)
class PolicyLoss:
    """Settings of the loss.

    Args:
        average: ``grpo`` averages over a thread's tokens, then over threads (DeepSeekMath Eq. 3); ``dr_grpo`` sums over
            tokens and divides by a constant, the length limit times the number of threads (arXiv 2503.20783);
            ``dapo`` averages over all tokens of the batch (arXiv 2503.14476 Eq. 8).
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: and above at 1 + clip_high; larger than clip_low is DAPO's "clip-higher".
        kl_weight: weight of the KL term towards the weights that training started from; 0 leaves it out.

    Raises:
        ValueError: an option is unknown or negative.
    """

    average: Average = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.average not in get_args(Average):
            raise ValueError(f"loss.average={self.average!r} is unknown: choose one of {', '.join(get_args(Average))}")
        if min(self.clip_low, self.clip_high, self.kl_weight) < 0 or self.clip_low >= 1:
            raise ValueError(
                f"loss.clip_low={self.clip_low} must lie in [0, 1), clip_high={self.clip_high} and "
                f"kl_weight={self.kl_weight} must not be negative"
            )

    def token_weights(
        self, mask: Tensor, max_length: int, add_up: Callable[[Tensor], Tensor] = lambda count: count
    ) -> Tensor:
        """(..., L) float32 weight of each token in the whole batch's loss; a plain sum of weighted losses is the loss.

        Args:
            mask: (..., N, L) bool, tokens that the model chose; leading dims are all groups that are here.
            max_length: the length limit of a thread, for ``dr_grpo``.
            add_up: from a count here to the count in the whole batch, of which other processes hold parts.
        """
        tokens = mask.float()
        if self.average == "dapo":
            return tokens / add_up(tokens.sum()).clamp_min(1)
        threads = add_up(tokens.new_tensor(mask[..., 0].numel())).clamp_min(1)
        own_length = tokens.sum(-1, keepdim=True).clamp_min(1) if self.average == "grpo" else max_length
        return tokens / own_length / threads

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        reference: Tensor | None = None,
    ) -> LossOutput:
        """Loss of some groups of a batch.

        Args:
            logprobs: (B, N, L) of the current weights, with gradients.
            old_logprobs: (B, N, L) of the weights that sampled.
            advantages: (B,) one per group, shared by every token of all its threads.
            weights: (B, N, L) of these groups, from :meth:`token_weights` over the whole batch.
            reference: (B, N, L) log-probabilities of the reference weights; needed if ``kl_weight`` is set.
        """
        ratio = torch.exp(logprobs - old_logprobs)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        advantage = advantages[:, None, None]
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -(surrogate * weights).sum()
        kl = logprobs.new_zeros(())
        if self.kl_weight:
            assert reference is not None
            log_ratio = reference - logprobs
            kl = ((log_ratio.exp() - log_ratio - 1) * weights).sum()  # the k3 estimator: unbiased and never negative
            loss = loss + self.kl_weight * kl
        chosen = weights > 0
        is_clipped = (surrogate < ratio * advantage) & chosen
        return LossOutput(loss, kl.detach(), is_clipped.sum(), chosen.sum())


class LossOutput(NamedTuple):
    """Loss to minimise, its KL part before weighting, and counts of clipped and of all chosen tokens."""

    loss: Tensor
    kl: Tensor
    num_clipped: Tensor
    num_chosen: Tensor
