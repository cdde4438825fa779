"""Attention over the lattice, behind one signature: (q, k, v, mask) -> output.

Shapes: q (B, h, Q, d), k and v (B, h, K, d), mask :class:`~lace_lightning.lattice.LatticeMask`; scaled by
1/sqrt(d). A query that may read nothing gets exactly zero, with zero gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lace_lightning.lattice import LatticeMask

Backend = Literal["auto", "eager", "sdpa", "flex"]


def attention_weights(q: Tensor, k: Tensor, mask: LatticeMask) -> Tensor:
    """(B, h, Q, K) softmax weights; rows that may read nothing are all zero."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask.dense, torch.finfo(scores.dtype).min)
    # An empty row is uniform after the softmax; the product makes it exactly zero, in values and gradients.
    return scores.softmax(-1) * mask.dense


def eager(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """The readable reference, in any floating dtype."""
    return attention_weights(q, k, mask) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with a dense mask."""
    # Kernels disagree about empty rows (NaN or zero): let such a row read everything, then drop what it read.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense | ~mask.reads_anything)
    return out.masked_fill(~mask.reads_anything, 0.0)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """FlexAttention: skips the blocks of keys that no query of a block may read. Compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask

    def reads(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = mask.topology.allows(q_idx + mask.first_query, kv_idx, mask.num_threads)
        return allowed & mask.key_visible[b, kv_idx]

    blocks = create_block_mask(
        reads, q.shape[0], None, q.shape[2], k.shape[2], device=str(q.device), _compile=q.is_cuda
    )
    return _flex_attention(q.is_cuda)(q, k, v, block_mask=blocks)


@cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, LatticeMask], Tensor]] = {
    "eager": eager,
    "sdpa": sdpa,
    "flex": flex,
}


def choose(backend: Backend, q: Tensor, mask: LatticeMask) -> Callable[[Tensor, Tensor, Tensor, LatticeMask], Tensor]:
    """The named backend; ``auto`` takes FlexAttention for long block-masked CUDA calls and SDPA elsewhere.

    Raises:
        ValueError: the backend is not known.
    """
    if backend == "auto":
        # Heads narrower than 16 have no FlexAttention kernel on CUDA.
        has_kernel = q.is_cuda and q.shape[-1] >= 16
        skips_blocks = has_kernel and mask.topology.scope != "aligned" and mask.num_queries >= 1024
        backend = "flex" if skips_blocks else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[backend]
