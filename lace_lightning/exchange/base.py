"""The exchange interface: any mechanism that lets threads read each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lace_lightning.lattice import Lattice

Site = Literal["attention", "layer"]
"""Where an exchange acts: on the attention's output before its output projection, or on the layer's output."""


@dataclass(frozen=True, eq=False)
class OwnAttention:
    """What the layer's own attention has just computed with, of a row per thread.

    Args:
        query: (B * N, H, P + L, d), turned by the backbone's positions; in decoding the columns of this pass only.
        key, value: (B * N, H_kv, C, d) of all C columns so far, the prompt among them.
        options: the other keywords of the backbone's attention function, ``scaling`` among them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """What an exchange must know of its backbone: widths, dtype and device of the layer that carries it."""

    attention_width: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


class Exchange(nn.Module, ABC):
    """One exchange block; one instance per lattice layer.

    ``reads_keys``: ``forward`` is given ``own``; for the site "attention" only.
    """

    site: ClassVar[Site]
    reads_keys: ClassVar[bool] = False

    @abstractmethod
    def forward(self, hidden: Tensor, lattice: Lattice, layer_idx: int, own: OwnAttention | None = None) -> Tensor:
        """What the threads read from each other.

        Args:
            hidden: (B, N, L, D) at this exchange's site; D is the attention width or the hidden size.
            lattice: the lattice of this pass.
            layer_idx: index of the decoder layer, the key of the cache.
            own: the layer's own attention, if this exchange ``reads_keys``.

        Returns:
            (B, N, L, D), to be added to ``hidden``; exactly zero in a fresh exchange (LACE.md §3, "Identity start")
            unless it has no weights to learn.
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

    @property
    def position_stride(self) -> int:
        """By how much the backbone's positions of thread n, times n, are moved after the prompt."""
        return 0

    @abstractmethod
    def build(self, geometry: Geometry) -> Exchange | None:
        """A fresh block for one lattice layer; None where threads stay isolated."""


@dataclass(frozen=True)
class Isolated(ExchangeConfig):
    """No exchange: the "Isolated Parallel" baseline (LACE.md §7)."""

    def build(self, geometry: Geometry) -> None:
        return None
