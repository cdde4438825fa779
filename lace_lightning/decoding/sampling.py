"""From logits to tokens: temperature, top-k, top-p and min-p, then one inverse-CDF draw per thread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a thread samples its next token; the defaults sample from the model's own distribution.

    The rules act in this order, each on the renormalised distribution that the one before left, as in transformers and
    vLLM: ``temperature``, ``top_k``, ``top_p``, ``min_p``.

    Args:
        temperature: 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches p, of the mass that ``top_k`` left.
        min_p: keep tokens at least this fraction as probable as the most probable one.

    Raises:
        ValueError: an option is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, fine, meaning in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} must be {meaning}")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Sample one token per row.

        Args:
            logits: (..., V).
            uniform: (...) in [0, 1), one random number per row.

        Returns:
            (...) long token ids.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = self.probabilities(logits).double().cumsum(-1)
        # Scaling by the total absorbs its rounding, so that the draw never runs past the last kept token.
        threshold = uniform.double()[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) float32 probabilities after temperature and truncation, renormalised."""
        logits = logits.float()
        # Below the largest first: no temperature is too small for float32 then.
        probs = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if 0 < self.top_k < probs.shape[-1]:
            probs = _among(probs, probs >= probs.topk(self.top_k).values[..., -1:])
        if self.top_p < 1:
            ordered, order = probs.sort(descending=True, stable=True)
            # A token stays if the mass before it has not reached p yet: the first one always does.
            is_kept = ordered.cumsum(-1) - ordered < self.top_p
            probs = _among(probs, torch.zeros_like(is_kept).scatter(-1, order, is_kept))
        if self.min_p > 0:
            probs = _among(probs, probs >= self.min_p * probs.amax(-1, keepdim=True))
        return probs


def _among(probs: Tensor, is_kept: Tensor) -> Tensor:
    """(..., V) probabilities given that the token is one of those kept."""
    kept = probs.masked_fill(~is_kept, 0.0)
    return kept / kept.sum(-1, keepdim=True)
