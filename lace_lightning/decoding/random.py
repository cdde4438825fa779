"""Counter-based random numbers: a draw depends on its group's seed, its thread and its column, on nothing else.

So a group decodes alike whatever else is in the batch, on every device, and a resumed run draws what it would have.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def uniform(seeds: Tensor, num_threads: int, column: int | Tensor) -> Tensor:
    """One draw per thread.

    Args:
        seeds: (B,) int64, one per group.
        num_threads: N.
        column: lattice time; a number, or (B, 1) one per group.

    Returns:
        (B, N) float64 in [0, 1), from the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014).
    """
    thread = torch.arange(num_threads, device=seeds.device)
    counter = column * num_threads + thread + 1  # unique per (thread, column) of one group
    bits = _finalise(_finalise(seeds)[:, None] + counter * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


def group_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: run seed, step, problem, index of the group."""
    digest = hashlib.blake2b("\0".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _finalise(x: Tensor) -> Tensor:
    """The SplitMix64 mixing function; int64 products wrap."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
