"""Exchanges: mechanisms that let threads read each other, behind one interface."""

from lace_lightning.exchange.base import Exchange, ExchangeConfig, Geometry, Isolated, OwnAttention
from lace_lightning.exchange.confident_attention import ConfidentAttention, ConfidentAttentionConfig
from lace_lightning.exchange.lattice_attention import LatticeAttention, LatticeAttentionConfig
from lace_lightning.exchange.same_step import SameStepConfig, SameStepExchange
from lace_lightning.exchange.shared_visibility import SharedVisibility, SharedVisibilityConfig

__all__ = [
    "ConfidentAttention",
    "ConfidentAttentionConfig",
    "Exchange",
    "ExchangeConfig",
    "Geometry",
    "Isolated",
    "LatticeAttention",
    "LatticeAttentionConfig",
    "OwnAttention",
    "SameStepConfig",
    "SameStepExchange",
    "SharedVisibility",
    "SharedVisibilityConfig",
]
