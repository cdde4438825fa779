"""Rotary positions of the lattice: some dims turn with lattice time, others with the thread index (LACE.md §3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # torch 2.11's compiler hashes what it calls, before its fields are there
class Rotation:
    """By how much each position of one pass is turned: made once, for queries and keys of all layers.

    The first ``time_dims`` of d turn with lattice time, the next ``thread_dims`` with the thread index, the rest stays.
    In each of the two parts the pairs (i, i + half) turn together.

    Args:
        cos, sin: (L, N, h, d), the same for all heads: products with what is contiguous are many times faster on CPUs
            than with what is broadcast over a middle dim. The sine is negative for the first dim of a pair.
        time_dims, thread_dims: d_t and d_n.
    """

    cos: Tensor
    sin: Tensor
    time_dims: int
    thread_dims: int

    @classmethod
    def of(
        cls,
        times: Tensor,
        num_threads: int,
        heads: int,
        dim: int,
        time_dims: int,
        thread_dims: int,
        base: float,
        dtype: torch.dtype,
    ) -> Rotation:
        """The rotation at lattice times (L,) of threads 0 … N-1.

        Args:
            heads, dim: h and d.
            base: the slowest pair of dims turns once in about ``2 * pi * base`` positions.
            dtype: of the queries and keys.
        """
        # float32 even under bf16: bf16 cannot tell lattice times above 256 apart.
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        threads = torch.arange(num_threads, device=times.device)
        shape = (len(times), num_threads)
        parts = (
            _angles(times.to(precision), time_dims, base)[:, None].expand(*shape, -1),
            _angles(threads.to(precision), thread_dims, base).expand(*shape, -1),
        )
        still = parts[0].new_zeros(*shape, dim - time_dims - thread_dims)
        cos = torch.cat([c for angles in parts for c in 2 * (angles.cos(),)] + [still.cos()], dim=-1)
        sin = torch.cat([s for angles in parts for s in (-angles.sin(), angles.sin())] + [still], dim=-1)
        cos, sin = (x.to(dtype)[:, :, None].repeat(1, 1, heads, 1) for x in (cos, sin))
        return cls(cos, sin, time_dims, thread_dims)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn queries or keys (B, L, N, h, d)."""
        half_time, half_thread = self.time_dims // 2, self.thread_dims // 2
        still = x.shape[-1] - self.time_dims - self.thread_dims
        a, b, c, d, e = x.split([half_time, half_time, half_thread, half_thread, still], dim=-1)
        # All dims at once, still ones too: narrow slices cost far more than the products that they save.
        return torch.addcmul(x * self.cos, torch.cat([b, a, d, c, e], dim=-1), self.sin)


def _angles(positions: Tensor, dims: int, base: float) -> Tensor:
    """(…, dims / 2) radians by which the pairs of ``dims`` turn at ``positions`` (…)."""
    half = dims // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=positions.dtype) / max(half, 1))
    return positions[..., None] * frequencies
