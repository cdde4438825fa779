"""Room for what kernels leave for one another: partial softmaxes, and what lies on a lattice layer's side path."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lace_lightning.engine.plan import exchange_block
from lace_lightning.engine.state import GroupState
from lace_lightning.engine.weights import SidePath
from lace_lightning.exchange.rotary import Rotation


class PartBuffers(NamedTuple):
    """Partial softmaxes: accumulators (rows, heads, parts, d), largest scores and masses (rows, heads, parts)."""

    acc: Tensor
    largest: Tensor
    mass: Tensor

    @classmethod
    def of(cls, size: tuple[int, int, int], dim: int, device: torch.device) -> PartBuffers:
        return cls(torch.empty(*size, dim, device=device), *torch.empty(2, *size, device=device))


class SideBuffers:
    """Room for one lattice layer's side path."""

    def __init__(self, side: SidePath, state: GroupState) -> None:
        self.side, size, config = side, state.capacity, side.config
        like = side.w_in
        self.inputs = like.new_empty(size.rows, 4 * config.width)
        self.out = like.new_empty(size.rows, config.width)
        tiles = size.num_groups * triton.cdiv(size.num_threads, exchange_block(size.num_threads))
        self.arrived = torch.zeros(tiles, config.heads + 1, dtype=torch.int32, device=like.device)
        self.tables = _rotary_tables(side, size.new, size.num_threads)
        self._shape = (size.rows, config.heads)
        self.joined: dict[int, PartBuffers] = {}

    def allocate(self, parts: int) -> None:
        """Room for that many parts; what was allocated before stays."""
        self.parts = 1 if self.side.config.scope == "aligned" else max(1, parts)
        if self.parts not in self.joined:
            size = (*self._shape, self.parts)
            self.joined[self.parts] = PartBuffers.of(size, self.side.config.dim, self.out.device)


def _rotary_tables(side: SidePath, columns: int, num_threads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 cosines and signed sines of :class:`Rotation`, by lattice time (columns, d) and by thread (N, d).

    A dim that does not turn has cosine 1 and sine 0.
    """
    config, device = side.config, side.w_in.device
    settings = (1, config.dim, *config.rotary_dims, config.rotary_base, torch.float32)

    def tables(times: Tensor, threads: int) -> tuple[Tensor, Tensor]:
        rotation = Rotation.of(times, threads, *settings)
        return rotation.cos.view(-1, config.dim), rotation.sin.view(-1, config.dim)

    by_time = tables(torch.arange(columns, device=device), 1)
    by_thread = tables(torch.zeros(1, device=device), num_threads)
    return *by_time, *by_thread
