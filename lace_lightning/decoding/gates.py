"""How far the gates stand open at tokens that have been decoded, a few columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lace_lightning.decoding.plain import PlainSteps
from lace_lightning.threaded_lm import ThreadedLM

MAX_PAIRS = 2**24
"""Most pairs of lattice positions whose attention weights are held at once, per head; a column takes what it takes."""


class GateReader:
    """Computes columns of groups once more, in a cache of its own, and reads the gates at their tokens.

    Memory grows with the length of threads and not, as that of one pass over whole threads, with its square. It can
    follow groups while they are decoded: the decoder is left alone, whatever engine it runs on.

    Args:
        model: what decodes them.
        prompt_ids, prompt_mask: (B, P) left-padded prompts.
        num_threads: N.
    """

    def __init__(self, model: ThreadedLM, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int) -> None:
        self._model, self._prompt, self._num_threads = model, (prompt_ids, prompt_mask), num_threads
        self._steps: PlainSteps | None = None
        self._length = prompt_ids.shape[1]

    @torch.no_grad()
    def read(self, tokens: Tensor, written: Tensor) -> Tensor | None:
        """The gates at the columns (B, N, columns) that follow those of the last call.

        Returns:
            (B, N, columns) float32: mean over lattice layers and channels, of no meaning where nothing was written.
            None if the model's exchange records no gates.
        """
        if self._steps is None:
            self._steps = PlainSteps(self._model, *self._prompt, self._num_threads)
        found, start = [], 0
        while start < tokens.shape[-1]:
            columns = slice(start, min(start + self._columns_at_once(), tokens.shape[-1]))
            readings = self._steps.read(tokens[..., columns], written[..., columns])
            found += [torch.stack([reading.gate.float() for reading in readings]).mean(0)] if readings else []
            self._length += columns.stop - start
            start = columns.stop
        return torch.cat(found, dim=-1) if found else None

    def _columns_at_once(self) -> int:
        """Columns L of the next pass: its queries times all keys, B (L N) (K + L) N, stay below the limit."""
        per_column = len(self._prompt[0]) * self._num_threads**2
        room = MAX_PAIRS // per_column
        return max(1, min(room // (2 * self._length), int((room / 2) ** 0.5)))
