"""The plain way to compute columns: the Hugging Face model with growing caches; the fast engine's reference."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from lace_lightning.lattice import Lattice, LatticeCache, Reading
from lace_lightning.threaded_lm import ThreadedLM


class PlainSteps:
    """The model with its caches: the prompt is computed once per group, then one column at a time."""

    def __init__(self, model: ThreadedLM, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int) -> None:
        self._model, self._num_threads = model, num_threads
        self._batch, prompt_length = prompt_ids.shape
        # Without a config every layer keeps all keys: a sliding window is then counted in real tokens, not columns.
        self._cache = DynamicCache()
        self._lattice_cache = LatticeCache()
        self._prompt_mask = prompt_mask
        self._mask = prompt_mask.repeat_interleave(num_threads, 0)
        self._time = 0
        if model.exchange_config.reads_prompt and model.exchanges:
            ids = prompt_ids.repeat_interleave(num_threads, 0)
            mask = prompt_mask[:, None].expand(-1, num_threads, -1)
            out = self._forward(ids, self._mask, model.lattice(mask, prompt_length, self._lattice_cache))
            self.prompt_logits = out.view(self._batch, num_threads, -1)
        else:
            out = self._forward(prompt_ids, prompt_mask, lattice=None)
            self._cache.batch_repeat_interleave(num_threads)
            self.prompt_logits = out[:, None].expand(-1, num_threads, -1)

    def step(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Feed one column (B, N) of tokens; returns (B, N, V) float32 logits, undefined where nothing was written."""
        logits = self._forward(tokens.reshape(-1, 1), *self._follow(written[..., None]))
        return logits.view(self._batch, self._num_threads, -1)

    def read(self, tokens: Tensor, written: Tensor) -> list[Reading]:
        """Feed some columns (B, N, columns) at once and record what the lattice layers do with them."""
        mask, lattice = self._follow(written)
        lattice.readings = []
        self._run(tokens.flatten(0, 1), mask, lattice)
        return lattice.readings

    def _follow(self, written: Tensor) -> tuple[Tensor, Lattice]:
        """The mask (rows, all columns so far) and the lattice of the next columns (B, N, columns)."""
        self._mask = torch.cat([self._mask, written.flatten(0, 1)], dim=1)
        lattice = Lattice(
            self._model.exchange_at,
            written,
            first_time=self._time,
            cache=self._lattice_cache,
            prompt=self._prompt_mask,
        )
        self._time += written.shape[-1]
        return self._mask, lattice

    def _forward(self, ids: Tensor, mask: Tensor, lattice: Lattice | None) -> Tensor:
        """(rows, V) float32 logits of the last of these columns."""
        return self._model.head(self._run(ids, mask, lattice)[:, -1]).float()

    def _run(self, ids: Tensor, mask: Tensor, lattice: Lattice | None) -> Tensor:
        """(rows, columns, D) hidden states of these columns."""
        return self._model.run(ids, mask, lattice, past_key_values=self._cache, use_cache=True)
