"""The engine's step in plain torch, for CPUs: the numbers of the Hugging Face model, in a third of the operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lace_lightning.engine.prompt import read_prompt
from lace_lightning.engine.weights import DecoderWeights, LayerWeights
from lace_lightning.lattice import Lattice, LatticeCache
from lace_lightning.threaded_lm import ThreadedLM


class FastSteps:
    """A model with preallocated caches.

    Letters: M = B * N rows, D hidden width, H and HKV query and key heads of width d, P prompt columns.
    """

    def __init__(
        self, model: ThreadedLM, prompt_ids: Tensor, prompt_mask: Tensor, num_threads: int, max_new_tokens: int
    ) -> None:
        self._model, self._weights = model, DecoderWeights(model)
        self._batch, self._num_threads = len(prompt_ids), num_threads
        self._length = prompt_ids.shape[1]  # columns in the caches so far
        self._time = 0
        hidden, cache = read_prompt(model, prompt_ids, prompt_mask)
        layers: list[Any] = cache.layers
        self._caches = [
            [_grown(x.repeat_interleave(num_threads, 0), max_new_tokens) for x in (layer.keys, layer.values)]
            for layer in layers
        ]
        self._visible = _grown(prompt_mask.repeat_interleave(num_threads, 0)[..., None], max_new_tokens)[..., 0]
        self._positions = prompt_mask.sum(-1).repeat_interleave(num_threads)
        self._cos, self._sin = self._weights.rotary_tables(self._length + max_new_tokens)
        self._lattice_cache = LatticeCache()
        self.prompt_logits = self._head(hidden)[:, None].expand(-1, num_threads, -1)

    def step(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Feed one column (B, N) of tokens; returns (B, N, V) float32 logits, undefined where nothing was written."""
        self._visible[:, self._length] = written.flatten()
        self._length += 1
        lattice = Lattice(self._model.exchange_at, written[..., None], first_time=self._time, cache=self._lattice_cache)
        turn = self._cos[self._positions, None], self._sin[self._positions, None]  # each (M, 1, d)
        visible = self._visible[:, : self._length]
        mask = None if visible.all() else visible[:, None, None]  # (M, 1, 1, columns)
        x = F.embedding(tokens.flatten(), self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            x = self._layer(x, index, layer, turn, mask, lattice)
        self._time += 1
        self._positions = self._positions + written.flatten()
        return self._head(x).view(self._batch, self._num_threads, -1)

    def _head(self, x: Tensor) -> Tensor:
        """(rows, V) float32 logits of hidden states before the final norm."""
        return self._model.head(F.rms_norm(x, x.shape[-1:], self._weights.norm, self._weights.eps)).float()

    def _layer(
        self,
        x: Tensor,
        index: int,
        layer: LayerWeights,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        lattice: Lattice,
    ) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:], layer.input_norm, self._weights.eps)
        out = self._attend(h, index, layer, turn, mask)
        if (here := lattice.at("attention", index)) is not None:
            out = here.apply(out[:, None]).squeeze(1)
        x = x + F.linear(out, layer.o)
        h = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self._weights.eps)
        x = x + F.linear(F.silu(F.linear(h, layer.gate)) * F.linear(h, layer.up), layer.down)
        return x if (here := lattice.at("layer", index)) is None else here.apply(x[:, None]).squeeze(1)

    def _attend(
        self, h: Tensor, index: int, layer: LayerWeights, turn: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """(M, H * d) what each thread reads of its own past."""
        q, k, v = (
            F.linear(h, weight, bias).unflatten(-1, (-1, self._weights.head_dim))
            for weight, bias in zip((layer.q, layer.k, layer.v), layer.biases or (None,) * 3, strict=True)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, q.shape[-1:], layer.q_norm, self._weights.eps)
            k = F.rms_norm(k, k.shape[-1:], layer.k_norm, self._weights.eps)
        q, k = _turned(q, *turn), _turned(k, *turn)
        keys, values = self._caches[index]
        keys[:, :, self._length - 1], values[:, :, self._length - 1] = k, v
        seen = slice(None, self._length)
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=mask,
            scale=self._weights.scale,
            enable_gqa=self._weights.num_heads != self._weights.num_key_heads,
        )
        return out.flatten(1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of the Llama family: the first half of the dims turns with the second."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _grown(x: Tensor, columns: int) -> Tensor:
    """(…, P, d) with room for further columns, contiguous."""
    out = x.new_zeros(*x.shape[:-2], x.shape[-2] + columns, x.shape[-1])
    out[..., : x.shape[-2], :] = x
    return out
