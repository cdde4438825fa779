"""Attention over the lattice, behind one signature: (q, k, v, mask) -> output.

Shapes: q (B, h, Q, d), k and v (B, h, K, d), mask :class:`~lace_lightning.lattice.LatticeMask`; scaled by
1/sqrt(d). A query that may read nothing gets exactly zero, with zero gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lace_lightning.exchange import folded
from lace_lightning.exchange.flash import flash, installed, plan, refusal
from lace_lightning.lattice import LatticeMask

Backend = Literal["auto", "eager", "sdpa", "folded", "pointwise", "flex", "flash"]

_logger = logging.getLogger(__name__)

BLOCK = 128
"""Positions per side of a block of FlexAttention's mask."""
MIN_BLOCKED = 1024
"""Queries, or columns, from which on a call is worth more than the least overhead."""
MAX_POINTWISE = 16
"""Keys up to which products and sums beat a kernel that works on tiles of 64."""
MIN_FLEX_WIDTH = 16
"""Head width below which FlexAttention has no kernel on CUDA."""


def attention_weights(q: Tensor, k: Tensor, mask: LatticeMask, bias: Tensor | None = None) -> Tensor:
    """(B, h, Q, K) softmax weights; rows that may read nothing are all zero.

    ``bias`` (B, 1, Q, K) is added to the scores.
    """
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask.dense, torch.finfo(scores.dtype).min)
    # An empty row is uniform after the softmax; the product makes it exactly zero, in values and gradients.
    return scores.softmax(-1) * mask.dense


def eager(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """The readable reference, in any floating dtype."""
    return attention_weights(q, k, mask) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with a dense mask."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_mask(mask))
    return out.masked_fill(~mask.reads_anything, 0.0)


def _dense_mask(mask: LatticeMask) -> Tensor:
    """(B, 1, Q, K) bool. Kernels disagree about empty rows (NaN or zero): let them read all; it is dropped later."""
    if "dense" not in mask.made:
        mask.made["dense"] = mask.dense | ~mask.reads_anything
    return mask.made["dense"]


def pointwise(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """Products and sums, for the few keys of a column: compilers fuse them, and matrix products of 4 x 4 waste tiles.

    In float32 under lower precisions: single products would be rounded otherwise.
    """
    wide_q, wide_k, wide_v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    scores = (wide_q[:, :, :, None] * wide_k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask.dense, torch.finfo(scores.dtype).min).softmax(-1) * mask.dense
    return (weights[..., None] * wide_v[:, :, None]).sum(-2).to(q.dtype)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """FlexAttention: skips the blocks of keys that no query of a block may read. Compiled on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled layer it is compiled with the layer.
    attend = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return attend(q, k, v, block_mask=block_mask(mask))


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Not dynamic=False: a run's batches differ in length, and each new length would be a recompilation.
    return torch.compile(flex_attention)


def block_mask(mask: LatticeMask) -> Any:
    """FlexAttention's block mask, made once per mask from the borders of its blocks alone.

    Evaluating the mask at every (query, key), as ``create_block_mask`` does, costs a thousand million of them at 32,768
    positions.
    """
    if "blocks" not in mask.made:
        mask.made["blocks"] = _block_mask(mask)
    return mask.made["blocks"]


def _block_mask(mask: LatticeMask) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def reads(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = mask.topology.allows(q_idx + mask.first_query, kv_idx, mask.num_threads)
        return allowed & mask.key_visible[b, kv_idx]

    some, full = block_relations(mask)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=reads,
        seq_lengths=(mask.num_queries, mask.key_visible.shape[1]),
    )


def block_relations(mask: LatticeMask) -> tuple[Tensor, Tensor]:
    """(B, query blocks, key blocks) bool, twice: blocks in which something may be read, and in which everything may.

    The first may name a block too many, never one too few; the second the other way round.
    """
    batch, num_keys = mask.key_visible.shape
    visible = F.pad(mask.key_visible, (0, -num_keys % BLOCK)).view(batch, 1, -1, BLOCK)
    first_query, last_query = (x[:, None] for x in _block_times(mask, mask.first_query, mask.num_queries))
    first_key, last_key = _block_times(mask, 0, num_keys)
    topology = mask.topology
    some, full = first_key <= last_query, last_key <= first_query
    window = 1 if topology.scope == "aligned" else topology.window
    if window is not None:
        some, full = some & (last_key > first_query - window), full & (first_key > last_query - window)
    if topology.own != "include":
        full = torch.zeros_like(full)
    return some & visible.any(-1), full & visible.all(-1)


def _block_times(mask: LatticeMask, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Column of the first and of the last position of each block of the positions start ... start + count - 1."""
    first = torch.arange(start, start + count, BLOCK, device=mask.key_visible.device)
    last = (first + BLOCK - 1).clamp_max(start + count - 1)
    return first // mask.num_threads, last // mask.num_threads


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (B, 1, query blocks) and, padded, indices (B, 1, query blocks, key blocks) of the True key blocks."""
    indices = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]


@dataclass(frozen=True)
class Heads:
    """How the queries and keys of a call are cut: h, d and their dtype."""

    count: int
    dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Attention:
    """A backend and what it makes of a mask once for all layers of a pass."""

    attend: Callable[[Tensor, Tensor, Tensor, LatticeMask], Tensor]
    prepare: Callable[[LatticeMask, Heads], Any]


BACKENDS: dict[str, _Attention] = {
    "eager": _Attention(eager, lambda mask, heads: mask.dense),
    "sdpa": _Attention(sdpa, lambda mask, heads: (_dense_mask(mask), mask.reads_anything)),
    "folded": _Attention(folded.folded, lambda mask, heads: folded.scores_to_add(mask, heads.count, heads.dtype)),
    "pointwise": _Attention(pointwise, lambda mask, heads: mask.dense),
    "flex": _Attention(flex, lambda mask, heads: block_mask(mask)),
    "flash": _Attention(flash, lambda mask, heads: plan(mask)),
}


def choose(backend: Backend, mask: LatticeMask, heads: Heads) -> _Attention:
    """The named backend, or another where ``flash`` cannot be used; ``auto`` takes the fastest. Logs a new choice.

    Raises:
        ValueError: the backend is not known.
    """
    name, why = str(backend), "as named"
    if backend == "auto":
        name, why = fastest(mask, heads)
    elif backend == "flash" and (reason := refusal(mask, heads.dtype, heads.dim)):
        name, why = fastest(mask, heads)
        why = f"{why}; not flash: {reason}"
    if name not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    if not torch.compiler.is_compiling():
        _announce(backend, name, why)
    return BACKENDS[name]


def fastest(mask: LatticeMask, heads: Heads) -> tuple[str, str]:
    """Backend for a call, and why."""
    if folded.pays(mask, heads.count):
        return "folded", "few positions, on a CPU"
    if mask.key_visible.device.type != "cuda":
        return "sdpa", "not on CUDA"
    if mask.topology.scope == "aligned" and mask.num_threads <= MAX_POINTWISE and len(mask.key_visible) >= MIN_BLOCKED:
        return "pointwise", "many columns of few threads"
    if mask.topology.scope == "aligned" or mask.num_queries < MIN_BLOCKED:
        return "sdpa", "few positions"
    if refusal(mask, heads.dtype, heads.dim) is None and (installed() != "torch" or heads.dim < MIN_FLEX_WIDTH):
        return "flash", f"many positions, by the kernel {installed()}"
    if heads.dim >= MIN_FLEX_WIDTH:
        return "flex", "many positions"
    return "sdpa", f"heads narrower than {MIN_FLEX_WIDTH}"


@cache
def _announce(backend: str, name: str, why: str) -> None:
    """Say once, on the first process, what was chosen."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (distributed and torch.distributed.get_rank()):
        _logger.info("lattice attention, backend=%s: %s (%s)", backend, name, why)
