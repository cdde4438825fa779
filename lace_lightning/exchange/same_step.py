"""Same-step attention over hidden states after the MLP, in the manner of Bridge (arXiv 2510.01143)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lace_lightning.exchange.backends import Heads, choose
from lace_lightning.exchange.base import Exchange, ExchangeConfig, Geometry, OwnAttention
from lace_lightning.lattice import Lattice, Own, Topology


@dataclass(frozen=True)
class SameStepConfig(ExchangeConfig):
    """Settings of :class:`SameStepExchange`.

    Args:
        width: width of queries, keys and values together.
        heads: attention heads.
        own: whether a thread attends to itself too.

    Raises:
        ValueError: width is not a multiple of heads.
    """

    width: int = 128
    heads: int = 4
    own: Own = "include"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"exchange width={self.width} must be a positive multiple of heads={self.heads}")

    def build(self, geometry: Geometry) -> SameStepExchange:
        return SameStepExchange(self, geometry)


class SameStepExchange(Exchange):
    """Pre-norm attention among the N hidden states of one column, added to the layer's output; no gate, no positions.

    As a reference for comparison it keeps the idea (what threads read is the residual stream of the same step) and
    our identity start; it does not reproduce every choice of the Bridge paper.
    """

    site = "layer"
    Config: ClassVar = SameStepConfig

    def __init__(self, config: SameStepConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"dtype": geometry.dtype, "device": geometry.device}
        self.norm = nn.RMSNorm(geometry.hidden_size, **factory)
        self.qkv = nn.Linear(geometry.hidden_size, 3 * config.width, bias=False, **factory)
        self.up = nn.Linear(config.width, geometry.hidden_size, bias=False, **factory)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, lattice: Lattice, layer_idx: int, own: OwnAttention | None = None) -> Tensor:
        batch, num_threads, columns, _ = hidden.shape
        heads, dim = self.config.heads, self.config.width // self.config.heads
        qkv = self.qkv(self.norm(hidden)).view(batch, num_threads, columns, 3, heads, dim)
        qkv = qkv.transpose(1, 2).reshape(batch * columns, num_threads, 3, heads, dim)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B*L, h, N, d)
        mask = lattice.mask(Topology("aligned", self.config.own))
        read = choose("auto", mask, Heads(heads, dim, q.dtype)).attend(q, k, v, mask).transpose(1, 2)
        return self.up(read.reshape(batch, columns, num_threads, -1).transpose(1, 2))
