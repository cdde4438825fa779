"""Rotary positions of the lattice: some dims turn with lattice time, others with the thread index (LACE.md §3)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, times: Tensor, threads: Tensor, time_dims: int, thread_dims: int, base: float) -> Tensor:
    """Rotate the first ``time_dims`` of d by lattice time and the next ``thread_dims`` by thread index.

    Args:
        x: (B, L, N, h, d) queries or keys.
        times: (L,) lattice times.
        threads: (N,) thread indices.
        base: the slowest pair of dims turns once in about ``2 * pi * base`` positions.

    Returns:
        (B, L, N, h, d) in the dtype of ``x``.
    """
    by_time, by_thread, still = x.split([time_dims, thread_dims, x.shape[-1] - time_dims - thread_dims], dim=-1)
    by_time = _turn(by_time, times[:, None, None], base)
    by_thread = _turn(by_thread, threads[:, None], base)
    return torch.cat([by_time, by_thread, still], dim=-1)


def _turn(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn the pairs (i, i + D/2) of the last dim by ``positions`` (..., broadcast to x's leading dims) radians."""
    half = x.shape[-1] // 2
    if half == 0:
        return x
    # float32 even under bf16: bf16 cannot tell lattice times above 256 apart.
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=precision) / half)
    angles = positions.to(precision)[..., None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
