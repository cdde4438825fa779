"""How far the gates stand open at tokens that have just been decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lace_lightning.decoding.decoder import left_pad
from lace_lightning.decoding.plain import PlainSteps
from lace_lightning.decoding.threads import Column
from lace_lightning.threaded_lm import ThreadedLM

MOST_COLUMNS = 64
"""Columns per forward pass."""


class GateReader:
    """Follows groups while they are decoded and reads the gates at their tokens.

    The decoder is left alone, whatever engine it runs on: columns are computed once more here, with caches of our own,
    as many at once as have come since the last call.

    Args:
        model: what decodes them.
        prompts: B lists of token ids.
        num_threads: N.
    """

    def __init__(self, model: ThreadedLM, prompts: Sequence[Sequence[int]], num_threads: int) -> None:
        self._model, self._prompts, self._num_threads = model, prompts, num_threads
        self._steps: PlainSteps | None = None

    @torch.no_grad()
    def read(self, columns: Sequence[Column]) -> Tensor | None:
        """The gates at the columns that follow those of the last call.

        Returns:
            (B, N, columns) float32 on the CPU: mean over lattice layers and channels, of no meaning where nothing was
            written. None if the model's exchange records no gates.
        """
        steps = self._steps = self._steps or self._begin()
        found = [self._read(steps, columns[at : at + MOST_COLUMNS]) for at in range(0, len(columns), MOST_COLUMNS)]
        known = [gates for gates in found if gates is not None]
        return torch.cat(known, dim=-1) if known else None

    def _begin(self) -> PlainSteps:
        device = next(self._model.parameters()).device
        return PlainSteps(self._model, *left_pad(self._prompts, 0, device), self._num_threads)

    def _read(self, steps: PlainSteps, columns: Sequence[Column]) -> Tensor | None:
        tokens, written = (
            torch.stack([getattr(column, name) for column in columns], dim=-1) for name in ("tokens", "written")
        )
        readings = steps.read(tokens, written)
        if not readings:
            return None
        return torch.stack([reading.gate.float() for reading in readings]).mean(0).cpu()
