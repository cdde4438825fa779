"""Attention over so few positions that the number of matrices, not their size, is what costs time on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lace_lightning.lattice import LatticeMask

LARGEST = 64
"""Most rows and columns of the scores of all heads together for which :func:`folded` pays."""


def pays(mask: LatticeMask, heads: int) -> bool:
    """Whether folding these heads is faster than a matrix for each: with the few positions of a column, on CPUs."""
    positions = max(mask.num_queries, mask.key_visible.shape[1])
    return mask.key_visible.device.type == "cpu" and heads * positions <= LARGEST


def folded(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """All heads of a batch entry in one matrix, in which the scores between different heads are masked.

    That computes h times as many scores as are needed, in a h-th of the matrices. Shapes as for every backend:
    q (B, h, Q, d), k and v (B, h, K, d).
    """
    batch, heads, _, dim = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch, -1, dim) for x in (q, k, v))  # (B, positions * h, d)
    weights = torch.baddbmm(scores_to_add(mask, heads, q.dtype), q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
    out = (weights @ v).view(batch, -1, heads, dim).transpose(1, 2)
    reads_itself = mask.is_full and mask.topology.own != "exclude"
    return out if reads_itself else out.masked_fill(~mask.reads_anything, 0.0)


def scores_to_add(mask: LatticeMask, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, Q * h, K * h), or (1, …) for all alike: 0 where the query reads the key, -inf elsewhere; made once per mask.

    A query that may read nothing reads everything in its head here, and :func:`folded` drops it.
    """
    name = ("folded", heads, dtype)
    if name not in mask.made:
        allowed = mask.dense | ~mask.reads_anything
        allowed = (allowed[:1] if mask.is_full else allowed)[:, 0, :, None, :, None]  # (B, Q, 1, K, 1)
        same_head = torch.eye(heads, dtype=torch.bool, device=allowed.device)[:, None]
        allowed = (allowed & same_head).flatten(3, 4).flatten(1, 2)
        nothing = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        mask.made[name] = nothing.masked_fill(~allowed, -torch.inf)
    return mask.made[name]
