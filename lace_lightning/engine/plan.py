"""How attention and exchange are split over a device: into parts, and how many threads a program takes at once."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from lace_lightning.engine.state import GroupState
from lace_lightning.engine.weights import DecoderWeights, SidePath

_GATE_BYTES = 2**16
"""Largest gate that a program keeps whole beside the rest, without spilling registers."""


@dataclass(frozen=True)
class Plan:
    """How attention is split over the device at some number of columns.

    Args:
        prompt_parts, own_parts: into how many parts each prompt and each thread is cut; 0: one program reads both.
        exchange_parts: into how many parts the lattice is cut.
    """

    prompt_parts: int
    own_parts: int
    exchange_parts: int


def plan(state: GroupState, weights: DecoderWeights, columns: int, num_processors: int) -> Plan:
    """A plan for up to ``columns`` decoded columns: enough programs to fill the device, none without work."""
    size = state.capacity
    wanted = 2 * num_processors
    heads, rows = weights.num_key_heads, size.rows
    lattice_heads = max((side.config.heads for side in weights.sides.values()), default=1)
    windows = [side.config.window or columns for side in weights.sides.values() if side.config.scope != "aligned"]
    lattice_keys = min(columns, max(windows, default=0)) * size.num_threads
    blocks = size.num_groups * triton.cdiv(size.num_threads, exchange_block(size.num_threads)) * lattice_heads
    exchange_parts = min(16, _parts(num_processors, blocks, lattice_keys, 256))
    is_short = size.prompt + columns <= 512
    reads_prompt_often = size.num_threads * size.prompt > 8192
    if not reads_prompt_often and (is_short or rows * heads >= wanted):
        return Plan(0, 0, exchange_parts)
    tiles = -(-size.num_threads // tile_threads(state, weights))
    return Plan(
        _parts(wanted, size.num_groups * tiles * heads, size.prompt, 128),
        _parts(wanted, rows * heads, columns, 128),
        exchange_parts,
    )


def _parts(wanted: int, tasks: int, keys: int, least: int) -> int:
    """Parts per task so that there are about ``wanted`` programs with at least ``least`` keys each; a power of two."""
    return triton.next_power_of_2(max(1, min(-(-wanted // tasks), keys // least)))


def tile_threads(state: GroupState, weights: DecoderWeights) -> int:
    """Threads whose queries read a prompt together: 64 queries per key head."""
    per_head = weights.num_heads // weights.num_key_heads
    return min(state.capacity.num_threads, max(1, 64 // per_head))


def exchange_block(num_threads: int) -> int:
    """Threads whose queries read the lattice together; a product has at least 16 rows."""
    return min(32, triton.next_power_of_2(max(16, num_threads)))


def is_small(side: SidePath, num_threads: int) -> bool:
    """Whether one program can hold the queries of all threads and heads of a group, and the gate's weights."""
    heads, weights = side.config.heads, side.w_gate.numel() * side.w_gate.element_size()
    is_whole = triton.next_power_of_2(heads) == heads
    return is_whole and triton.next_power_of_2(num_threads) * heads <= 64 and weights <= _GATE_BYTES
