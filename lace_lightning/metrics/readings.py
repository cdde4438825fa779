"""What lattice layers do, added up: how far their gates open, and whom the threads attend to (LACE.md §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lace_lightning.lattice import Reading
from lace_lightning.traces.template import Segment

SEGMENTS = (Segment.THOUGHT, Segment.ENVIRONMENT, Segment.ASSESSMENT, Segment.TAG)
"""Columns of the layer × segment map."""


class ReadingMaps(NamedTuple):
    """K lattice layers, S segments, T bins of lattice time, N threads; nan where there was no token to look at.

    Args:
        gate_by_segment: (K, S) mean gate.
        gate_by_time: (K, T) mean gate; the trailing bins that no thread reached are left out.
        thread_share: (N, N) share of thread n's (dim 0) attention mass on m (dim 1), mean over layers and groups.
    """

    gate_by_segment: Tensor
    gate_by_time: Tensor
    thread_share: Tensor


class ReadingMetrics(Metric):
    """Means of gates and attention shares over tokens; states are sums, so ranks may see different numbers of groups.

    Args:
        layers: indices of the K lattice layers.
        num_threads: N.
        num_columns: most lattice columns after the prompt.
        num_bins: at most so many bins of equal width that lattice time is cut into.

    Raises:
        ValueError: ``num_columns`` or ``num_bins`` is not positive.
    """

    full_state_update = False
    gate: Tensor
    tokens: Tensor
    cross: Tensor
    cross_tokens: Tensor
    share: Tensor
    share_rows: Tensor

    def __init__(self, layers: Sequence[int], num_threads: int, num_columns: int, num_bins: int = 32) -> None:
        super().__init__()
        if num_columns < 1 or num_bins < 1:
            raise ValueError(f"num_columns={num_columns} and num_bins={num_bins} must be at least 1")
        self.layers = list(layers)
        self.bin_width = -(-num_columns // num_bins)
        bins = -(-num_columns // self.bin_width)
        shape = (len(self.layers), len(SEGMENTS), bins)
        self.add_state("gate", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("cross", torch.zeros(len(self.layers)), dist_reduce_fx="sum")
        self.add_state("cross_tokens", torch.zeros(len(self.layers), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("share", torch.zeros(num_threads, num_threads), dist_reduce_fx="sum")
        self.add_state("share_rows", torch.zeros(num_threads, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, readings: Sequence[Reading], segments: Tensor) -> None:
        """Add one pass over B groups.

        Args:
            readings: one per lattice layer; if they begin with prompt columns, these are not counted.
            segments: (B, N, L) values of :class:`Segment` after the prompt; L at most ``num_columns``.
        """
        segments = segments.to(self.device)
        real = segments >= SEGMENTS[0]
        times = torch.arange(segments.shape[-1], device=self.device).expand_as(segments)
        cells = (segments[real].long() - SEGMENTS[0]) * self.gate.shape[-1] + times[real] // self.bin_width
        for reading in readings:
            layer = self.layers.index(reading.layer_idx)
            gate, cross = (
                part[..., -segments.shape[-1] :].float()[real] for part in (reading.gate, reading.cross_share)
            )
            self.gate[layer].view(-1).index_add_(0, cells, gate)
            self.tokens[layer].view(-1).index_add_(0, cells, torch.ones_like(cells))
            self.cross[layer] += cross.nansum()
            self.cross_tokens[layer] += cross.isfinite().sum()
            self.share += reading.thread_share.float().sum(0)
            self.share_rows += (reading.thread_share.sum(-1) > 0).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Scalars under the names by which they are logged, see ``docs/metrics.md``; nan where nothing was seen."""
        per_layer = self.gate.sum((1, 2)) / self.tokens.sum((1, 2))
        per_segment = self.gate.sum((0, 2)) / self.tokens.sum((0, 2))
        cross = self.cross / self.cross_tokens
        return (
            {f"gate/layer_{layer}": value for layer, value in zip(self.layers, per_layer, strict=True)}
            | {f"gate/{segment.name.lower()}": value for segment, value in zip(SEGMENTS, per_segment, strict=True)}
            | {f"cross_ratio/layer_{layer}": value for layer, value in zip(self.layers, cross, strict=True)}
            | {"cross_ratio/mean": self.cross.sum() / self.cross_tokens.sum()}
        )

    def maps(self) -> ReadingMaps:
        """The pictures behind the scalars, over all ranks. Every rank must call it."""
        with self.sync_context(should_sync=self._to_sync):
            by_time, tokens = self.gate.sum(1), self.tokens.sum(1)
            reached = int(tokens.sum(0).nonzero().max()) + 1 if tokens.any() else 0
            return ReadingMaps(
                gate_by_segment=self.gate.sum(2) / self.tokens.sum(2),
                gate_by_time=(by_time / tokens)[:, :reached],
                thread_share=self.share / self.share_rows[:, None],
            )
