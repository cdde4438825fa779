"""Exchanges: mechanisms that let threads read each other, behind one interface."""

from lace_lightning.exchange.base import Exchange, ExchangeConfig, Geometry, Isolated
from lace_lightning.exchange.lattice_attention import LatticeAttention, LatticeAttentionConfig
from lace_lightning.exchange.same_step import SameStepConfig, SameStepExchange

__all__ = [
    "Exchange",
    "ExchangeConfig",
    "Geometry",
    "Isolated",
    "LatticeAttention",
    "LatticeAttentionConfig",
    "SameStepConfig",
    "SameStepExchange",
]
