"""Lattice attention whose tokens read the most confident threads only: a variant of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lace_lightning.exchange.base import Geometry
from lace_lightning.exchange.lattice_attention import LatticeAttention, LatticeAttentionConfig
from lace_lightning.lattice import Lattice, LatticeMask


@dataclass(frozen=True)
class ConfidentAttentionConfig(LatticeAttentionConfig):
    """Settings of :class:`ConfidentAttention`, besides those of lattice attention.

    Args:
        top_k: how many other threads a token reads at most; its own thread is read besides.
        margin: a thread whose confidence exceeds that of the best thread left out by this much is read with weight
            1 - 1/e; towards 0 the choice becomes hard. Confidences lie between 0 and 1.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """

    top_k: int = 1
    margin: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1 thread")
        if self.margin <= 0:
            raise ValueError(f"margin={self.margin} must be positive")
        if self.own != "include":
            raise ValueError(f"own={self.own!r}: a token always reads its own thread here, set own: include")
        if self.backend not in ("auto", "eager"):
            raise ValueError(f"backend={self.backend!r}: scores that threads' confidences change need auto or eager")

    def build(self, geometry: Geometry) -> ConfidentAttention:
        return ConfidentAttention(self, geometry)


class ConfidentAttention(LatticeAttention):
    """Lattice attention in which other threads are weighed by a learned confidence, and only the best are read.

    A token's confidence is c = sigmoid(w Z), in (0, 1). C(m, t), the mean of c over thread m's tokens up to t,
    ranks the threads m that a token (n, t) may read at all, n itself left out. With C' the (top_k + 1)-th largest, or
    0, thread m gets the weight a(m) = 1 - exp(-(C(m, t) - C') / margin) if C(m, t) > C', else 0, and its scores get
    + log a(m).

    The weight goes to 0 where a thread is about to leave the choice: rounding cannot turn it over, equal threads are
    treated alike, and w learns although a choice has no gradient.
    """

    Config: ClassVar = ConfidentAttentionConfig
    config: ConfidentAttentionConfig

    def __init__(self, config: ConfidentAttentionConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        factory: dict[str, Any] = {"dtype": geometry.dtype, "device": geometry.device}
        self.confidence = nn.Linear(config.width, 1, bias=False, **factory)

    def _bias(self, z: Tensor, mask: LatticeMask, lattice: Lattice, layer_idx: int) -> Tensor:
        num_threads = lattice.num_threads
        own = torch.eye(num_threads, dtype=torch.bool, device=z.device)  # (N, N)
        readable = mask.dense[:, 0].unflatten(-1, (-1, num_threads)).any(-2)  # (B', Q, N)
        readable = readable.view(*z.shape[:2], num_threads, num_threads) & ~own  # (B, L, N, N): who reads whom
        ranked = self._confidences(z, lattice, layer_idx)[:, :, None].masked_fill(~readable, 0.0)
        excess = (ranked - self._cut(ranked)).clamp_min(0.0)  # exp would overflow below, and make gradients of NaN
        is_read = readable & (excess > 0)
        # log(1) where nothing is read: the logarithm of 0 would make gradients of NaN.
        weight = torch.where(is_read, -torch.expm1(-excess / self.config.margin), 1.0)
        bias = weight.log().masked_fill(~is_read & ~own, -torch.inf)
        bias = bias.view(len(mask.key_visible), 1, mask.num_queries, num_threads)
        return bias.repeat(1, 1, 1, mask.key_visible.shape[1] // num_threads)  # keys are time-major: thread i % N

    def _cut(self, ranked: Tensor) -> Tensor:
        """(B, L, N, 1) the largest confidence that is left out; 0 where none is."""
        k = self.config.top_k
        if k >= ranked.shape[-1]:
            return ranked.new_zeros(())
        return ranked.topk(k + 1, dim=-1).values[..., -1:]

    def _confidences(self, z: Tensor, lattice: Lattice, layer_idx: int) -> Tensor:
        """(B, L, N) mean confidence of each thread's tokens up to each column, in float32 or more; 0 before any."""
        visible = lattice.visible.transpose(1, 2)
        logits = self.confidence(z)[..., 0]
        confidence = torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())
        totals = torch.stack([confidence * visible, visible.to(confidence)], dim=-1).cumsum(1)  # (B, L, N, 2)
        if lattice.cache is not None:
            totals = lattice.cache.add_up(layer_idx, totals)
        return totals[..., 0] / totals[..., 1].clamp_min(1.0)
