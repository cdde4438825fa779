"""The plain way to compute columns: the Hugging Face model with growing caches; the fast engine's reference."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from lace_lightning.lattice import Lattice, LatticeCache
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
        self._mask = torch.cat([self._mask, written.reshape(-1, 1)], dim=1)
        lattice = Lattice(
            self._model.exchange_at,
            written[..., None],
            first_time=self._time,
            cache=self._lattice_cache,
            prompt=self._prompt_mask,
        )
        self._time += 1
        return self._forward(tokens.reshape(-1, 1), self._mask, lattice).view(self._batch, self._num_threads, -1)

    def _forward(self, ids: Tensor, mask: Tensor, lattice: Lattice | None) -> Tensor:
        """(rows, V) float32 logits of the last of these columns."""
        hidden = self._model.run(ids, mask, lattice, past_key_values=self._cache, use_cache=True)
        return self._model.head(hidden[:, -1]).float()
