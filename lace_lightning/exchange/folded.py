"""Attention over so few positions that the number of matrices, not their size, is what costs time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lace_lightning.exchange.backends import Backend, choose
from lace_lightning.lattice import LatticeMask

LARGEST = 64
"""Most rows and columns of the scores of all heads together for which :func:`folded` pays."""


def attention(
    backend: Backend, q: Tensor, mask: LatticeMask
) -> Callable[[Tensor, Tensor, Tensor, LatticeMask], Tensor]:
    """The backend of that name; ``auto`` takes :func:`folded` on CPUs for the few positions of a column."""
    side = q.shape[1] * max(mask.num_queries, mask.key_visible.shape[1])
    is_small = q.device.type == "cpu" and side <= LARGEST
    return folded if backend == "auto" and is_small else choose(backend, q, mask)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """All heads of a batch entry in one matrix, in which the scores between different heads are masked.

    That computes h times as many scores as are needed, in a h-th of the matrices. Shapes as for every backend:
    q (B, h, Q, d), k and v (B, h, K, d).
    """
    batch, heads, _, dim = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch, -1, dim) for x in (q, k, v))  # (B, positions * h, d)
    if "folded" not in mask.made:
        mask.made["folded"] = _scores_to_add(mask, heads, q.dtype)
    weights = torch.baddbmm(mask.made["folded"], q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
    out = (weights @ v).view(batch, -1, heads, dim).transpose(1, 2)
    reads_itself = mask.is_full and mask.topology.own != "exclude"
    return out if reads_itself else out.masked_fill(~mask.reads_anything, 0.0)


def _scores_to_add(mask: LatticeMask, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, Q * h, K * h), or (1, …) for all alike: 0 where the query reads the key, -inf elsewhere.

    A query that may read nothing reads everything in its head here, and :func:`folded` drops it.
    """
    allowed = mask.dense | ~mask.reads_anything
    allowed = (allowed[:1] if mask.is_full else allowed)[:, 0, :, None, :, None]  # (B, Q, 1, K, 1)
    same_head = torch.eye(heads, dtype=torch.bool, device=allowed.device)[:, None]
    allowed = (allowed & same_head).flatten(3, 4).flatten(1, 2)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)
