"""The exchange interface: any mechanism that lets threads read each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lace_lightning.lattice import Lattice

Site = Literal["attention", "layer"]
"""Where an exchange acts: on the attention's output before its output projection, or on the layer's output."""


@dataclass(frozen=True)
class Geometry:
    """What an exchange must know of its backbone: widths, dtype and device of the layer that carries it."""

    attention_width: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


class Exchange(nn.Module, ABC):
    """One exchange block; one instance per lattice layer."""

    site: ClassVar[Site]

    @abstractmethod
    def forward(self, hidden: Tensor, lattice: Lattice, layer_idx: int) -> Tensor:
        """What the threads read from each other.

        Args:
            hidden: (B, N, L, D) at this exchange's site; D is the attention width or the hidden size.
            lattice: the lattice of this pass.
            layer_idx: index of the decoder layer, the key of the cache.

        Returns:
            (B, N, L, D), to be added to ``hidden``; exactly zero in a fresh exchange (LACE.md §3, "Identity start").
        """

    def prepare(self, lattice: Lattice) -> None:
        """Make what all layers of a pass share, such as masks; called before a layer whose code is compiled."""


@dataclass(frozen=True)
class ExchangeConfig(ABC):
    """Plain settings of an exchange, saved beside its weights; YAML chooses the subclass by class path.

    Args:
        reads_prompt: the exchange is on for prompt columns too; the prompt is then computed once per thread, not once
            per group.
    """

    reads_prompt: bool = False

    @abstractmethod
    def build(self, geometry: Geometry) -> Exchange | None:
        """A fresh block for one lattice layer; None where threads stay isolated."""


@dataclass(frozen=True)
class Isolated(ExchangeConfig):
    """No exchange: the "Isolated Parallel" baseline (LACE.md §7)."""

    def build(self, geometry: Geometry) -> None:
        return None
