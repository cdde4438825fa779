"""One collated batch of traces on the lattice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lace_lightning.traces.template import Segment


@dataclass
class TraceBatch:
    """B traces of N threads on L common columns; the first ``prompt_length`` columns hold the left-padded prompt.

    Args:
        input_ids: (B, N, L) long; pad id where no token stands.
        attention_mask: (B, N, L) bool: a real token stands here. Holes inside a thread are waiting columns.
        segments: (B, N, L) uint8 values of :class:`Segment`; 0 exactly where ``attention_mask`` is False.
        prompt_length: number of prompt columns P.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    segments: torch.Tensor
    prompt_length: int

    @property
    def written(self) -> torch.Tensor:
        """(B, N, L) bool: tokens that the thread itself wrote, the targets of SFT (no prompt, no environment)."""
        return (self.segments == Segment.THOUGHT) | (self.segments >= Segment.ASSESSMENT)

    @property
    def unforced(self) -> torch.Tensor:
        """(B, N, L) bool: every real token that no environment wrote, the targets of pre-training stages."""
        return self.attention_mask & (self.segments != Segment.ENVIRONMENT)
